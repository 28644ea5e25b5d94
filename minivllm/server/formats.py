"""How completions and chat word the same thing: a sample's answer, whole or in pieces."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol

from minivllm.request import TokenLogprob
from minivllm.server.logprobs import TextOffsets, chat_logprobs, completion_logprobs, prompt_logprobs
from minivllm.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    StopReason,
)
from minivllm.tokenizer.tokenizer import Tokenizer

Logprobs = list[TokenLogprob | int] | None
"""A bare token id: nothing is known of it."""
Choice = CompletionChoice | ChatChoice | ChatChunkChoice


class Format(Protocol):
    """The shapes of one route's answers. Made anew for each request."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def choice(self, index: int, text: str, logprobs: Logprobs, finish_reason: StopReason) -> Choice:
        """A whole answer."""

    def opening(self, index: int) -> Choice | None:
        """What an answer's stream begins with, before there is any text."""

    def chunk_choice(self, index: int, text: str, logprobs: Logprobs) -> Choice:
        """A piece of an answer."""

    def closing(self, index: int, finish_reason: StopReason) -> Choice:
        """What an answer's stream ends with."""

    def add_prompt_logprobs(self, content: dict[str, Any], found: list[list[TokenLogprob]]) -> None:
        """Put the prompts' own log probabilities into a whole answer; ``found`` has one list a sample."""


class CompletionFormat:
    """``/v1/completions``, where a piece of an answer looks like a whole one."""

    id_prefix = "cmpl-"
    object_name = chunk_object_name = "text_completion"

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._offsets: defaultdict[int, TextOffsets] = defaultdict(
            lambda: TextOffsets(tokenizer, skip_special_tokens=skip_special_tokens)
        )

    def choice(
        self, index: int, text: str, logprobs: Logprobs, finish_reason: StopReason | None
    ) -> CompletionChoice:
        """See :class:`Format`."""
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logprobs),
            "finish_reason": finish_reason,
        }

    def opening(self, index: int) -> None:
        """Nothing: text is all there is."""

    def chunk_choice(self, index: int, text: str, logprobs: Logprobs) -> CompletionChoice:
        """See :class:`Format`."""
        return self.choice(index, text, logprobs, None)

    def closing(self, index: int, finish_reason: StopReason) -> CompletionChoice:
        """See :class:`Format`."""
        return self.choice(index, "", None, finish_reason)

    def add_prompt_logprobs(self, content: dict[str, Any], found: list[list[TokenLogprob]]) -> None:
        """Into each choice."""
        per_choice = len(found) // len(content["choices"])
        for choice, entries in zip(content["choices"], found[::per_choice], strict=True):
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, entries)

    def _logprobs(self, index: int, logprobs: Logprobs) -> CompletionLogprobs | None:
        if logprobs is None:
            return None
        return completion_logprobs(self._tokenizer, logprobs, self._offsets[index])


class ChatFormat:
    """``/v1/chat/completions``, where an answer is a message, and a piece of one a delta."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def choice(self, index: int, text: str, logprobs: Logprobs, finish_reason: StopReason) -> ChatChoice:
        """See :class:`Format`."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }

    def opening(self, index: int) -> ChatChunkChoice:
        """The role."""
        delta: ChatDelta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk_choice(self, index: int, text: str, logprobs: Logprobs) -> ChatChunkChoice:
        """See :class:`Format`."""
        delta: ChatDelta = {"content": text}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(logprobs), "finish_reason": None}

    def closing(self, index: int, finish_reason: StopReason) -> ChatChunkChoice:
        """See :class:`Format`."""
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish_reason}

    def add_prompt_logprobs(self, content: dict[str, Any], found: list[list[TokenLogprob]]) -> None:
        """Beside the choices, which have one prompt."""
        content["prompt_logprobs"] = prompt_logprobs(self._tokenizer, found[0])

    def _logprobs(self, logprobs: Logprobs) -> ChatLogprobs | None:
        if logprobs is None:
            return None
        known = [entry for entry in logprobs if not isinstance(entry, int)]  # all: a chat echoes nothing
        return chat_logprobs(self._tokenizer, known)
