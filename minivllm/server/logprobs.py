"""Log probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

import codecs

from minivllm.request import TokenLogprob
from minivllm.server.responses import ChatLogprobs, CompletionLogprobs, TopLogprob
from minivllm.tokenizer.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON can't hold. OpenAI's number."""


class TextOffsets:
    """Where each token of an answer begins in its text, in characters.

    A character's bytes may be spread over several tokens, so bytes are counted as UTF-8 decodes them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def add(self, token_id: int) -> int:
        """The place of the answer's next token."""
        offset = self._offset
        self._offset += len(self._decoder.decode(self._tokenizer.join_bytes([token_id])))
        return offset


def completion_logprobs(
    tokenizer: Tokenizer, logprobs: list[TokenLogprob], offsets: TextOffsets
) -> CompletionLogprobs:
    """As in ``/v1/completions``. ``offsets`` has seen the answer's earlier tokens.

    The sampled token is among its ``top_logprobs`` even where it isn't among the most likely.
    """
    top_logprobs: list[dict[str, float]] = []
    for entry in logprobs:
        top: dict[str, float] = {}
        for token_id, logprob in [*entry.top, (entry.token_id, entry.logprob)]:
            # Pieces of characters may share a text: the most likely one keeps it.
            top.setdefault(tokenizer.token_to_text(token_id), max(logprob, MIN_LOGPROB))
        top_logprobs.append(top)
    return {
        "tokens": [tokenizer.token_to_text(entry.token_id) for entry in logprobs],
        "token_logprobs": [max(entry.logprob, MIN_LOGPROB) for entry in logprobs],
        "top_logprobs": top_logprobs,
        "text_offset": [offsets.add(entry.token_id) for entry in logprobs],
    }


def chat_logprobs(tokenizer: Tokenizer, logprobs: list[TokenLogprob]) -> ChatLogprobs:
    """As in ``/v1/chat/completions``."""

    def describe(token_id: int, logprob: float) -> TopLogprob:
        return {
            "token": tokenizer.token_to_text(token_id),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return {
        "content": [
            {**describe(entry.token_id, entry.logprob), "top_logprobs": [describe(*top) for top in entry.top]}
            for entry in logprobs
        ],
        "refusal": None,
    }
