"""Tool calls of Llama 3.1 and 3.2: ``{"name": …, "parameters": {…}}``, after ``<|python_tag|>`` or alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ClassVar

from minivllm.tools.call_object import WHITESPACE, CallObject
from minivllm.tools.events import Event, EventList

TAG = "<|python_tag|>"


class LlamaJsonParser:
    """See :class:`minivllm.tools.events.ToolCallParser`.

    The answer begins with a call, or a call follows the tag; several are separated by ``;``. Anywhere
    else an object is content, as a model may show one in its text.
    """

    markers: ClassVar[tuple[str, ...]] = (TAG,)

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._events = EventList()
        self._step: Callable[[str], None] = self._between
        self._held: list[str] = []  # content, unless a call follows
        self._tag = ""  # as much of the tag as was read, at the end of what is held
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
        if self._events.num_calls == 0 or "".join(self._held).strip(WHITESPACE + ";"):
            self._release()
        return self._events.take()

    def _between(self, char: str) -> None:
        """At the start, after the tag, and after a call: whitespace counts only if content follows."""
        if char == "{":
            self._call = CallObject(self._names, self._events)
            self._step = self._in_call
        elif char == TAG[0]:
            self._step, self._tag = self._in_tag, ""
            self._in_tag(char)
        elif char in WHITESPACE or (char == ";" and self._events.num_calls):
            self._held.append(char)
        else:
            self._give_up(char)

    def _in_tag(self, char: str) -> None:
        if not TAG.startswith(self._tag + char):
            self._give_up(char)
            return
        self._held.append(char)
        self._tag += char
        if self._tag == TAG:
            self._step = self._between

    def _in_call(self, char: str) -> None:
        num_calls = self._events.num_calls
        is_part = self._call.push(char)
        if self._events.num_calls > num_calls:
            self._held.clear()
        if not is_part:
            self._held.append(self._call.held)
            self._give_up(char)
        elif self._call.is_done:
            self._step = self._between

    def _in_content(self, char: str) -> None:
        if char == TAG[0]:
            self._step, self._tag = self._in_tag, ""
            self._in_tag(char)
        else:
            self._events.content(char)

    def _give_up(self, char: str) -> None:
        """No call: what was held is content, and ``char`` is, or begins the tag."""
        self._release()
        self._step = self._in_content
        self._in_content(char)

    def _release(self) -> None:
        self._events.content("".join(self._held))
        self._held.clear()
