"""Log probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minivllm.request import TokenLogprob
from minivllm.server.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from minivllm.tokenizer.detokenizer import IncrementalDetokenizer
from minivllm.tokenizer.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON can't hold. OpenAI's number."""


class TextOffsets:
    """Where each token of an answer begins in its text, in characters.

    A character's bytes may be spread over several tokens, and some text isn't shown, so the text is worked
    out as it is for the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        """``before``: the token ids that the answer goes on from."""
        self._detokenizer = IncrementalDetokenizer(tokenizer, before, skip_special_tokens=skip_special_tokens)
        self._offset = 0

    def add(self, token_id: int) -> int:
        """The place of the answer's next token."""
        offset = self._offset
        self._offset += len(self._detokenizer.push([token_id]))
        return offset


def with_top(logprobs: list[TokenLogprob], count: int) -> list[TokenLogprob]:
    """``logprobs`` with no more than ``count`` of the most likely tokens each."""
    return [replace(entry, top=entry.top[:count]) for entry in logprobs]


def completion_logprobs(
    tokenizer: Tokenizer, logprobs: list[TokenLogprob | int], offsets: TextOffsets
) -> CompletionLogprobs:
    """As in ``/v1/completions``. ``offsets`` has seen the answer's earlier tokens.

    A token is among its ``top_logprobs`` even where it isn't among the most likely. A bare token id is
    one of which nothing is known.
    """
    token_ids = [entry if isinstance(entry, int) else entry.token_id for entry in logprobs]
    top_logprobs: list[dict[str, float] | None] = []
    for entry in logprobs:
        if isinstance(entry, int):
            top_logprobs.append(None)
            continue
        top: dict[str, float] = {}
        for token_id, logprob in [*entry.top, (entry.token_id, entry.logprob)]:
            # Pieces of characters may share a text: the most likely one keeps it.
            top.setdefault(tokenizer.token_to_text(token_id), max(logprob, MIN_LOGPROB))
        top_logprobs.append(top)
    return {
        "tokens": [tokenizer.token_to_text(token_id) for token_id in token_ids],
        "token_logprobs": [
            None if isinstance(entry, int) else max(entry.logprob, MIN_LOGPROB) for entry in logprobs
        ],
        "top_logprobs": top_logprobs,
        "text_offset": [offsets.add(token_id) for token_id in token_ids],
    }


def prompt_logprobs(tokenizer: Tokenizer, logprobs: list[TokenLogprob]) -> PromptLogprobs:
    """As vLLM words a prompt's; ``logprobs`` has none for the prompt's first token."""

    def describe(token_id: int, logprob: float, rank: int | None) -> PromptLogprob:
        return {
            "logprob": max(logprob, MIN_LOGPROB),
            "rank": rank,
            "decoded_token": tokenizer.token_to_text(token_id),
        }

    return [
        None,
        *(
            {str(entry.token_id): describe(entry.token_id, entry.logprob, entry.rank)}
            | {
                str(token_id): describe(token_id, value, n)
                for n, (token_id, value) in enumerate(entry.top, 1)
            }
            for entry in logprobs
        ),
    ]


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
