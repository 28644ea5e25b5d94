"""Tool calls of Hermes and Qwen models: ``<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ClassVar

from minivllm.tools.call_object import WHITESPACE, CallObject
from minivllm.tools.events import Event, EventList

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser:
    """See :class:`minivllm.tools.events.ToolCallParser`. Calls may come anywhere in the text.

    A call whose closing tag is missing counts as one all the same.
    """

    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._events = EventList()
        self._step: Callable[[str], None] = self._between
        self._held: list[str] = []  # content, unless a call follows
        self._tag = ""  # as much of a tag as was read, at the end of what is held
        self._call = CallObject(names, self._events)

    def push(self, text: str) -> list[Event]:
        """See :class:`minivllm.tools.events.ToolCallParser`."""
        for char in text:
            self._step(char)
        return self._events.take()

    def finish(self) -> list[Event]:
        """See :class:`minivllm.tools.events.ToolCallParser`."""
        if self._step == self._in_call:
            self._held.append(self._call.held)
        is_blank = not "".join(self._held).strip(WHITESPACE)
        if self._step != self._in_close_tag and not (is_blank and self._events.num_calls):
            self._release()
        return self._events.take()

    def _between(self, char: str) -> None:
        """At the start, and after a call: whitespace counts only if content follows."""
        if char == "<":
            self._step = self._in_open_tag
            self._tag = ""
            self._in_open_tag(char)
        elif char in WHITESPACE:
            self._held.append(char)
        else:
            self._step = self._in_content
            self._release()
            self._in_content(char)

    def _in_content(self, char: str) -> None:
        if char == "<":
            self._between(char)
        else:
            self._events.content(char)

    def _in_open_tag(self, char: str) -> None:
        if not OPEN.startswith(self._tag + char):
            self._give_up(char)
            return
        self._held.append(char)
        self._tag += char
        if self._tag == OPEN:
            self._step = self._before_object

    def _before_object(self, char: str) -> None:
        if char == "{":
            self._call = CallObject(self._names, self._events)
            self._step = self._in_call
        elif char in WHITESPACE:
            self._held.append(char)
        else:
            self._give_up(char)

    def _in_call(self, char: str) -> None:
        num_calls = self._events.num_calls
        is_part = self._call.push(char)
        if self._events.num_calls > num_calls:
            self._held.clear()
        if not is_part:
            self._held.append(self._call.held)
            self._give_up(char)
        elif self._call.is_done:
            self._step, self._tag = self._in_close_tag, ""

    def _in_close_tag(self, char: str) -> None:
        """After an object: whitespace, then the tag."""
        if char in WHITESPACE and not self._tag:
            self._held.append(char)
        elif CLOSE.startswith(self._tag + char):
            self._held.append(char)
            self._tag += char
            if self._tag == CLOSE:
                self._held.clear()
                self._step = self._between
        else:  # no tag, or the next call's
            held, self._held, self._step = self._held, [], self._between
            for earlier in held:
                self._step(earlier)
            self._step(char)

    def _give_up(self, char: str) -> None:
        """No call: what was held is content, and ``char`` may begin another."""
        self._release()
        self._step = self._in_content
        self._in_content(char)

    def _release(self) -> None:
        self._events.content("".join(self._held))
        self._held.clear()
