"""A model's reasoning, ``<think>…</think>``, split off from its answer."""

from __future__ import annotations

from collections.abc import Callable

from minivllm.tools.events import WHITESPACE

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Splits one answer as it arrives. Made anew for each.

    Reasoning is what comes before the answer between the tags, as DeepSeek-R1 and Qwen3 write it; a tag
    later in the text is text. Whitespace inside and after the tags is dropped. Reasoning without an end
    is all reasoning. Time is linear in the text's length.
    """

    markers = (OPEN, CLOSE)
    """Texts that may be special tokens, and must be shown to the splitter."""

    def __init__(self, *, is_open: bool) -> None:
        """``is_open``: the prompt ended with the opening tag, as some chat templates write it."""
        self._is_open = is_open
        self._step: Callable[[str], None] = self._at_start
        self._held: list[str] = []  # whitespace, and as much of a tag as was read
        self._tag = ""
        self._reasoning: list[str] = []
        self._answer: list[str] = []

    def push(self, text: str) -> tuple[str, str]:
        """The reasoning and the answer that more text brings."""
        for char in text:
            self._step(char)
        return self._take()

    def finish(self) -> tuple[str, str]:
        """What was held back, when no more text comes."""
        if self._step == self._in_reasoning:
            self._reasoning.append("".join(self._held).rstrip(WHITESPACE))
        elif self._step == self._at_start:
            held = "".join(self._held)
            if self._is_open:
                self._reasoning.append(held.strip(WHITESPACE))
            else:
                self._answer.append(held)
        return self._take()

    def _take(self) -> tuple[str, str]:
        reasoning, answer = "".join(self._reasoning), "".join(self._answer)
        self._reasoning.clear()
        self._answer.clear()
        return reasoning, answer

    def _at_start(self, char: str) -> None:
        if char in WHITESPACE and not self._tag:
            self._held.append(char)
        elif OPEN.startswith(self._tag + char):
            self._held.append(char)
            self._tag += char
            if self._tag == OPEN:
                self._begin_reasoning("")
        elif self._is_open:
            self._begin_reasoning("".join(self._held).lstrip(WHITESPACE) + char)
        else:
            self._answer += [*self._held, char]
            self._step = self._answer.append

    def _begin_reasoning(self, text: str) -> None:
        self._step, self._held, self._tag = self._before_reasoning, [], ""
        for char in text:
            self._step(char)

    def _before_reasoning(self, char: str) -> None:
        if char not in WHITESPACE:
            self._step = self._in_reasoning
            self._in_reasoning(char)

    def _in_reasoning(self, char: str) -> None:
        if CLOSE.startswith(self._tag + char):
            self._held.append(char)
            self._tag += char
            if self._tag == CLOSE:
                self._step = self._before_answer
            return
        if char in WHITESPACE and not self._tag:
            self._held.append(char)
            return
        if self._tag:  # no closing tag, but this character may begin one, or whitespace
            self._release()
            self._in_reasoning(char)
        else:
            self._reasoning += [*self._held, char]
            self._held.clear()

    def _release(self) -> None:
        self._reasoning += self._held
        self._held.clear()
        self._tag = ""

    def _before_answer(self, char: str) -> None:
        if char not in WHITESPACE:
            self._answer.append(char)
            self._step = self._answer.append
