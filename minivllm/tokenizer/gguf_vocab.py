"""The tokenizer inside a GGUF file: vocabulary, merges or scores, and flags, all in its metadata.

Keys are described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What a missing key
means is llama.cpp's to say, for which these files are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers

from minivllm.errors import ModelLoadError
from minivllm.tokenizer.bpe import (
    TokenType,
    add_around_text,
    byte_level_bpe,
    mark_added_tokens,
    sentencepiece_bpe,
)
from minivllm.tokenizer.tokenizer import Tokenizer
from minivllm.weights.gguf_roles import default_token_id

# A file names its pre-tokenizer (``tokenizer.ggml.pre``); the expressions are those of the original
# models' own tokenizers.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")
_GPT2 = (_WORDS,)
_SMOLLM = (r"\p{N}", _WORDS)
_LLAMA3 = ("|".join([_CONTRACTIONS, _LETTERS, r"\p{N}{1,3}", _SYMBOLS, _SPACES]),)
_QWEN2 = ("|".join([_CONTRACTIONS, _LETTERS, r"\p{N}", _SYMBOLS, _SPACES]),)
_TEKKEN = (
    "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            _SPACES,
        ]
    ),
)

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), _SMOLLM),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
"""``tokenizer.ggml.pre`` to the expressions that cut text, one after the other."""
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # these also add BOS by default

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Template variable to what ``tokenizer.ggml.…_token_id`` calls it."""


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes, with its chat template.

    Raises :class:`ModelLoadError` where a key is missing or malformed, or the kind of vocabulary or
    pre-tokenizer isn't known.
    """
    kind = _get(metadata, "tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise ModelLoadError(f"tokenizer.ggml.model must be gpt2 or llama, got {kind!r}")
    tokens = _get_list(metadata, "tokenizer.ggml.tokens", str)
    types: list[int] = [TokenType.NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = _get_list(metadata, "tokenizer.ggml.token_type", int, length=len(tokens))

    special_tokens: dict[str, str] = {}
    for name, role in _ROLES.items():
        default = default_token_id(metadata, role)
        token_id = _get(metadata, f"tokenizer.ggml.{role}_token_id", int, default=default)
        # Some converters write an id past the end for a token that there isn't.
        if token_id is not None and 0 <= token_id < len(tokens):
            special_tokens[name] = tokens[token_id]

    if kind == "llama":
        backend = _sentencepiece(metadata, tokens, types, special_tokens)
        adds_bos = True
    else:
        pre_tokenizer = _get(metadata, "tokenizer.ggml.pre", str, default="default")
        backend = _byte_level(metadata, tokens, pre_tokenizer)
        adds_bos = pre_tokenizer in _IGNORE_MERGES
    mark_added_tokens(backend, tokens, types)
    add_around_text(
        backend,
        bos=_added(metadata, "tokenizer.ggml.add_bos_token", adds_bos, special_tokens, "bos_token"),
        eos=_added(metadata, "tokenizer.ggml.add_eos_token", False, special_tokens, "eos_token"),
    )
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        chat_template=_get(metadata, "tokenizer.chat_template", str, default=None),
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], pre_tokenizer: str) -> tokenizers.Tokenizer:
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise ModelLoadError(
            f"tokenizer.ggml.pre is {pre_tokenizer!r}, a way to split text that isn't known here; "
            f"known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    merges: list[tuple[str, str]] = []
    for merge in _get_list(metadata, "tokenizer.ggml.merges", str):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise ModelLoadError(f"tokenizer.ggml.merges must hold pairs, got {merge!r}")
        merges.append((left, right))
    return byte_level_bpe(
        tokens,
        merges,
        split_patterns=PRE_TOKENIZERS[pre_tokenizer],
        ignore_merges=pre_tokenizer in _IGNORE_MERGES,
    )


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], special_tokens: dict[str, str]
) -> tokenizers.Tokenizer:
    if "unk_token" not in special_tokens:
        raise ModelLoadError("tokenizer.ggml.unknown_token_id must be an id of the vocabulary")
    return sentencepiece_bpe(
        tokens,
        _get_list(metadata, "tokenizer.ggml.scores", float, length=len(tokens)),
        types,
        unk_token=special_tokens["unk_token"],
        add_space_prefix=_get(metadata, "tokenizer.ggml.add_space_prefix", bool, default=True),
    )


def _added(
    metadata: Mapping[str, Any], key: str, default: bool, special_tokens: dict[str, str], name: str
) -> str | None:
    """The special token to put around texts, if ``key`` says so."""
    if not _get(metadata, key, bool, default=default):
        return None
    if name not in special_tokens:
        raise ModelLoadError(
            f"texts get a {name} ({key}), but tokenizer.ggml.{_ROLES[name]}_token_id names none"
        )
    return special_tokens[name]


_REQUIRED: Any = object()


def _get(metadata: Mapping[str, Any], key: str, kind: type, *, default: Any = _REQUIRED) -> Any:
    value = metadata.get(key, default)
    if value is _REQUIRED:
        raise ModelLoadError(f"{key} is missing")
    if value is not default and type(value) is not kind:
        raise ModelLoadError(f"{key} must be {kind.__name__}, got {value!r}")
    return value


def _get_list(metadata: Mapping[str, Any], key: str, kind: type, *, length: int | None = None) -> list[Any]:
    values: list[Any] = _get(metadata, key, list)
    if not set(map(type, values)) <= {kind}:
        raise ModelLoadError(f"{key} must hold {kind.__name__} only")
    if length is not None and len(values) != length:
        raise ModelLoadError(f"{key} must have one entry for each of the {length} tokens, got {len(values)}")
    return values
