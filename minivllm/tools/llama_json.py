"""Tool calls of Llama 3.1 and 3.2: ``{"name": …, "parameters": {…}}``, after ``<|python_tag|>`` or alone."""

from __future__ import annotations

from typing import ClassVar

from minivllm.tools.events import WHITESPACE, Event
from minivllm.tools.held_text import CallObjectParser

TAG = "<|python_tag|>"


class LlamaJsonParser(CallObjectParser):
    """See :class:`minivllm.tools.events.ToolCallParser`.

    The answer begins with a call, or a call follows the tag; several are separated by ``;``. Anywhere
    else an object is content, as a model may show one in its text.
    """

    markers: ClassVar[tuple[str, ...]] = (TAG,)

    def finish(self) -> list[Event]:
        """See :class:`minivllm.tools.events.ToolCallParser`."""
        self._hold_unread()
        if self._events.num_calls == 0 or "".join(self._held).strip(WHITESPACE + ";"):
            self._release()
        return self._events.take()

    def _between(self, char: str) -> None:
        """At the start, after the tag, and after a call: whitespace counts only if content follows."""
        if char == "{":
            self._begin_object()
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

    def _after_object(self) -> None:
        self._step = self._between

    def _in_content(self, char: str) -> None:
        if char == TAG[0]:
            self._step, self._tag = self._in_tag, ""
            self._in_tag(char)
        else:
            self._events.content(char)
