"""Tokens of a GGUF's vocabulary with a role that no key gives them: as llama.cpp, for which these files are
written, finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""``tokenizer.ggml.…_token_id`` of a SentencePiece vocabulary that lacks the key."""

_ENDS = {
    "</s>", "<|end_of_text|>", "<|endoftext|>",  # of a text
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>",  # of a turn
    "<EOT>", "▁<EOT>", "[EOT]", "[EOS]",
    "<|eom_id|>",  # of a message: a tool's turn
}  # fmt: skip


def default_token_id(metadata: Mapping[str, Any], role: str) -> int | None:
    """The id of the token with a role ("bos", "eos" …) where its key is missing; None for no token."""
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    return _SENTENCEPIECE_IDS.get(role) if is_sentencepiece else None


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens whose text says that they end a turn: many files name only one of them."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return []
    return [token_id for token_id, token in enumerate(tokens) if token in _ENDS]
