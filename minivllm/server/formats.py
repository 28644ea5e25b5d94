"""How completions and chat word the same thing: a sample's answer, whole or in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from minivllm.request import TokenLogprob
from minivllm.server.chat import ChatTurn
from minivllm.server.logprobs import TextOffsets, chat_logprobs, completion_logprobs, prompt_logprobs
from minivllm.server.message import MessageParser, join
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
    shown_token_ids: frozenset[int]
    """Special tokens that show their text, because something is to be read off them."""

    def begin(self, index: int, before: Sequence[int]) -> None:
        """An answer comes. Its text goes on from the token ids ``before``: none, where it echoes them."""

    def choice(self, index: int, text: str, logprobs: Logprobs, finish_reason: StopReason) -> Choice:
        """A whole answer."""

    def opening(self, index: int) -> Choice | None:
        """What an answer's stream begins with, before there is any text."""

    def chunk_choice(self, index: int, text: str, logprobs: Logprobs) -> Choice | None:
        """A piece of an answer. None where there is nothing to send yet."""

    def closing(self, index: int, finish_reason: StopReason) -> list[Choice]:
        """What an answer's stream ends with."""

    def add_prompt_logprobs(self, content: dict[str, Any], found: list[list[TokenLogprob]]) -> None:
        """Put the prompts' own log probabilities into a whole answer; ``found`` has one list a prompt."""


class CompletionFormat:
    """``/v1/completions``, where a piece of an answer looks like a whole one."""

    id_prefix = "cmpl-"
    object_name = chunk_object_name = "text_completion"
    shown_token_ids: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._offsets: dict[int, TextOffsets] = {}

    def begin(self, index: int, before: Sequence[int]) -> None:
        """See :class:`Format`."""
        self._offsets[index] = TextOffsets(
            self._tokenizer, before, skip_special_tokens=self._skip_special_tokens
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

    def closing(self, index: int, finish_reason: StopReason) -> list[Choice]:
        """See :class:`Format`."""
        return [self.choice(index, "", None, finish_reason)]

    def add_prompt_logprobs(self, content: dict[str, Any], found: list[list[TokenLogprob]]) -> None:
        """Into each choice."""
        num_answers = len(content["choices"]) // len(found)
        for place, choice in enumerate(content["choices"]):
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, found[place // num_answers])

    def _logprobs(self, index: int, logprobs: Logprobs) -> CompletionLogprobs | None:
        if logprobs is None:
            return None
        return completion_logprobs(self._tokenizer, logprobs, self._offsets[index])


class ChatFormat:
    """``/v1/chat/completions``, where an answer is a message, and a piece of one a delta."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, turn: ChatTurn) -> None:
        self.shown_token_ids = turn.shown_token_ids
        self._tokenizer = tokenizer
        self._turn = turn
        self._no_content = None if turn.is_parsed else ""
        self._parsers: dict[int, MessageParser] = {}

    def begin(self, index: int, before: Sequence[int]) -> None:
        """See :class:`Format`."""
        self._parsers[index] = self._turn.make_parser()

    def choice(self, index: int, text: str, logprobs: Logprobs, finish_reason: StopReason) -> ChatChoice:
        """See :class:`Format`."""
        parser = self._parsers[index]
        return {
            "index": index,
            "message": join((parser.push(text), parser.finish()), content=self._no_content),
            "logprobs": self._logprobs(logprobs),
            "finish_reason": _finish_reason(parser, finish_reason),
        }

    def opening(self, index: int) -> ChatChunkChoice:
        """The role; and no content where there may be none."""
        return _chunk(index, {"role": "assistant", "content": self._no_content})

    def chunk_choice(self, index: int, text: str, logprobs: Logprobs) -> ChatChunkChoice | None:
        """See :class:`Format`."""
        delta = self._parsers[index].push(text)
        if not delta and not logprobs:
            return None
        return _chunk(index, delta, self._logprobs(logprobs))

    def closing(self, index: int, finish_reason: StopReason) -> list[Choice]:
        """See :class:`Format`."""
        parser = self._parsers[index]
        rest = parser.finish()
        last = _chunk(index, {}, None, _finish_reason(parser, finish_reason))
        return [_chunk(index, rest), last] if rest else [last]

    def add_prompt_logprobs(self, content: dict[str, Any], found: list[list[TokenLogprob]]) -> None:
        """Beside the choices, which have one prompt."""
        content["prompt_logprobs"] = prompt_logprobs(self._tokenizer, found[0])

    def _logprobs(self, logprobs: Logprobs) -> ChatLogprobs | None:
        if logprobs is None:
            return None
        known = [entry for entry in logprobs if not isinstance(entry, int)]  # all: a chat echoes nothing
        return chat_logprobs(self._tokenizer, known)


def _chunk(
    index: int,
    delta: ChatDelta,
    logprobs: ChatLogprobs | None = None,
    finish_reason: StopReason | None = None,
) -> ChatChunkChoice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _finish_reason(parser: MessageParser, reason: StopReason) -> StopReason:
    return "tool_calls" if parser.has_calls and reason == "stop" else reason
