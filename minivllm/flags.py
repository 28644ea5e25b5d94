"""Command-line flags, made from the configuration dataclasses: one flag per field, one help line each."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Container, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from minivllm import __version__
from minivllm.config import PRESETS, flag, format_size, parse_size
from minivllm.errors import ConfigError

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and names the nearest flag for an unknown one."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"minivllm {__version__}")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags that were given, and only those. Ends the program for an unknown or malformed one."""
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"
            self.error(f"unknown argument {name}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)

    def add_config(self, config: type[Any], title: str, *, only: Container[str] | None = None) -> None:
        """A flag for each field of a configuration dataclass, or for those named in ``only``."""
        group = self.add_argument_group(title)
        hints = get_type_hints(config)
        for field in fields(config):
            if only is not None and field.name not in only:
                continue
            kind = next((t for t in get_args(hints[field.name]) if t is not type(None)), hints[field.name])
            is_size, choices = field.metadata["is_size"], field.metadata["choices"]
            options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
            if get_origin(hints[field.name]) is tuple:
                options |= {"action": "extend", "nargs": "+", "metavar": "TEXT"}
            elif kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif choices:
                options["choices"] = choices
            else:
                options["type"] = _size if is_size else kind
                options["metavar"] = "SIZE" if is_size else {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag(field.name), **options)

    def add_preset(self) -> None:
        """``--preset``."""
        self.add_argument(
            "--preset",
            choices=sorted(PRESETS),
            help="several flags at once, which a flag given beside it overrides; "
            + "; ".join(
                f"{name}: {' '.join(f'{flag(field)} {value}' for field, value in values.items())}"
                for name, values in PRESETS.items()
            ),
        )

    def make_config(self, config: type[Config], parsed: argparse.Namespace) -> Config:
        """The dataclass from the flags that were given, the preset's, and its own defaults."""
        given = vars(parsed)
        names = {field.name for field in fields(config)}  # type: ignore[arg-type]
        values = {**PRESETS.get(given.get("preset") or "", {}), **given}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        try:
            return config(**{name: value for name, value in values.items() if name in names})
        except ConfigError as error:
            self.error(str(error))


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _help(field: Any) -> str:
    text: str = field.metadata["help"]
    if "default:" not in text and field.default not in (None, MISSING):
        default = format_size(field.default) if field.metadata["is_size"] else field.default
        if isinstance(default, tuple):
            default = " ".join(default) or "none"
        text += f" (default: {default})"
    return text.replace("%", "%%")
