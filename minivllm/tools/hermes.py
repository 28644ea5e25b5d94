"""Tool calls of Hermes and Qwen models: ``<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>``."""

from __future__ import annotations

from typing import ClassVar

from minivllm.tools.events import WHITESPACE, Event
from minivllm.tools.held_text import CallObjectParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(CallObjectParser):
    """See :class:`minivllm.tools.events.ToolCallParser`. Calls may come anywhere in the text.

    A call whose closing tag is missing counts as one all the same.
    """

    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def finish(self) -> list[Event]:
        """See :class:`minivllm.tools.events.ToolCallParser`."""
        self._hold_unread()
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
            self._begin_object()
        elif char in WHITESPACE:
            self._held.append(char)
        else:
            self._give_up(char)

    def _after_object(self) -> None:
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
