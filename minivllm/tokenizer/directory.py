"""A tokenizer in a folder: ``tokenizer.json`` and the settings beside it, or what transformers can read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minivllm.errors import ModelLoadError
from minivllm.tokenizer.files import naming, read_text
from minivllm.tokenizer.tokenizer import Tokenizer
from minivllm.weights.checkpoint import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A directory with a tokenizer has at least one of these."""


def tokenizer_from_directory(directory: Path) -> Tokenizer:
    """The tokenizer that ``directory`` holds, with its special tokens and chat template.

    Raises :class:`ModelLoadError`, naming the file at fault.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():  # SentencePiece's tokenizer.model (Llama 2), or a slow tokenizer's files
        from minivllm.tokenizer.hf_fallback import load_with_transformers

        with naming(directory):
            template = _read_chat_template(directory, _read_settings(directory))
            return load_with_transformers(directory, template)
    with naming(path):
        backend = _read_tokenizer_json(path)
    with naming(directory / "tokenizer_config.json"):
        settings = _read_settings(directory)
        special_tokens = _special_tokens(settings)
        _add_tokens(backend, settings, special_tokens.values())
        chat_template = _read_chat_template(directory, settings)
    with naming(path):
        return Tokenizer(backend, special_tokens=special_tokens, chat_template=chat_template)


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelLoadError(f"not a tokenizer: {error}") from None


def _read_settings(directory: Path) -> dict[str, Any]:
    """``tokenizer_config.json``; what older models keep in files of their own is put in its place there."""
    settings = _read_optional(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read_optional(directory / "special_tokens_map.json")
        added_tokens = _read_optional(directory / "added_tokens.json")
        settings["added_tokens_decoder"] = {i: {"content": token} for token, i in added_tokens.items()}
    return settings


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and its like: each a string, or an object with a "content"."""
    named = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            named[name] = text
    return named


def _add_tokens(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], special_tokens: Iterable[str]
) -> None:
    """Add the tokens that the settings list and the vocabulary lacks; those with a role are special."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    try:
        listed = {int(i): _added_token(fields) for i, fields in settings["added_tokens_decoder"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"added_tokens_decoder is malformed: {error!r}") from None
    backend.add_tokens([token for _, token in sorted(listed.items()) if token.content not in known])
    for token_id, token in listed.items():
        if backend.token_to_id(token.content) != token_id:
            raise ModelLoadError(
                f"the token {token.content!r} has the id {token_id} here, but "
                f"{backend.token_to_id(token.content)} in the vocabulary"
            )
    backend.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in special_tokens
            if not known.get(text) and backend.token_to_id(text) is not None
        ]
    )


def _added_token(fields: Mapping[str, Any]) -> AddedToken:
    flags = {name: fields[name] for name in ("special", "lstrip", "rstrip", "single_word") if name in fields}
    # Not normalized: SentencePiece's normalizer would want a ▁ before it.
    return AddedToken(fields["content"], normalized=False, **flags)


def _read_chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """From its own file, or the settings: of several templates, the one called "default"."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    template = settings.get("chat_template")
    if template is None:
        template = _read_optional(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelLoadError(f"chat_template must be a string, got {type(template).__name__}")
    return template
