"""Typed reads of a model's configuration, which comes from a file that anybody may have written."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from minivllm.errors import ModelLoadError


class Fields:
    """Typed reads of a mapping. null counts as missing, and what has no default is required.

    Whatever is missing, of the wrong type or out of range is a :class:`ModelLoadError` that names it.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, name: str) -> Any:
        """The value as it is; None where it is missing."""
        return self.values.get(name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from ``low`` to ``high``."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._error(name, f"an integer from {low} to {high}", value)
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from ``low`` to ``high``."""
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise self._error(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, "true or false", value)
        return value

    def string(self, name: str, default: str | None = None) -> str:
        """Any text."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._error(name, "a string", value)
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        """One of ``choices``."""
        value = self._get(name, default)
        if value not in choices:
            raise self._error(name, " or ".join(choices), value)
        return str(value)

    def token_ids(self, name: str, vocab_size: int) -> list[int]:
        """One token id, a list of them, or none."""
        value = self.get(name)
        token_ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in token_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                raise self._error(name, f"token ids from 0 to {vocab_size - 1}", value)
        return token_ids

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelLoadError(f"{self.source}: {name} is missing")
        return value

    def _error(self, name: str, expected: str, value: Any) -> ModelLoadError:
        return ModelLoadError(f"{self.source}: {name} must be {expected}, got {reprlib.repr(value)}")
