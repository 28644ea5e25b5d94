"""Tool calls as Python: ``[f(a=1, b="x"), g()]``, as Llama 3.2 and 4 may write them."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import ClassVar

from minivllm.tools.events import WHITESPACE, Event
from minivllm.tools.held_text import HeldTextParser
from minivllm.tools.python_literal import PythonLiteral

MAX_KEYWORD_CHARS = 256


class PythonicParser(HeldTextParser):
    """See :class:`minivllm.tools.events.ToolCallParser`.

    The answer begins with a list of calls; arguments are literals with a keyword each, and come out as
    JSON. A call is certain from its first ``=`` on, or its closing parenthesis. What can't be read after
    that is content, and the arguments lack their end: they must not look whole when some are missing.
    """

    markers: ClassVar[tuple[str, ...]] = ()  # Llama 4's <|python_start|> brings nothing, so it may be hidden

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._name = ""
        self._keyword = ""
        self._is_certain = self._has_arguments = False  # the call that is being read
        self._value = PythonLiteral()

    def finish(self) -> list[Event]:
        """See :class:`minivllm.tools.events.ToolCallParser`."""
        if self._step == self._in_value:
            self._events.arguments(self._value.held)
        if self._events.num_calls == 0 or "".join(self._held).strip(WHITESPACE + ","):
            self._release()
        return self._events.take()

    def _between(self, char: str) -> None:
        """At the start, and after a list."""
        if char == "[":
            self._step = self._before_name
        elif char not in WHITESPACE:
            self._give_up(char)
            return
        self._held.append(char)

    def _before_name(self, char: str) -> None:
        if char in WHITESPACE:
            self._held.append(char)
        else:
            self._name, self._step = "", self._in_name
            self._in_name(char)

    def _in_name(self, char: str) -> None:
        if char == "(" and self._name in self._names:
            self._step, self._is_certain = self._before_keyword, False
        else:
            self._name += char
            if not any(name.startswith(self._name) for name in self._names):
                self._give_up(char)
                return
        self._held.append(char)

    def _before_keyword(self, char: str) -> None:
        """After the parenthesis, or a comma."""
        if char == ")":
            self._end_call()
        elif char in WHITESPACE:
            self._held.append(char)
        elif char.isidentifier():
            self._keyword, self._step = char, self._in_keyword
            self._held.append(char)
        else:
            self._give_up(char)

    def _in_keyword(self, char: str) -> None:
        self._held.append(char)
        if char == "=":
            keyword = json.dumps(self._keyword.rstrip(WHITESPACE), ensure_ascii=False)
            self._certain()
            self._events.arguments(f"{', ' if self._has_arguments else ''}{keyword}: ")
            self._has_arguments = True
            self._value, self._step = PythonLiteral(), self._in_value
        elif char in WHITESPACE or (f"_{char}".isidentifier() and self._keyword[-1] not in WHITESPACE):
            self._keyword += char
            if len(self._keyword) > MAX_KEYWORD_CHARS:
                self._held.pop()
                self._give_up(char)
        else:
            self._held.pop()
            self._give_up(char)

    def _in_value(self, char: str) -> None:
        self._events.arguments(self._value.push(char))
        if self._value.has_failed:
            self._held.append(self._value.held)
            self._give_up(char)
        elif self._value.is_done:
            self._step = self._before_keyword
            if char == ")":
                self._end_call()
            else:
                self._held.append(char)

    def _end_call(self) -> None:
        self._certain()
        self._events.arguments("}")
        self._step = self._after_call

    def _after_call(self, char: str) -> None:
        if char == "]":
            self._held.clear()
            self._step = self._between
        elif char == "," or char in WHITESPACE:
            self._held.append(char)
            if char == ",":
                self._step = self._before_name
        else:
            self._give_up(char)

    def _certain(self) -> None:
        if not self._is_certain:
            self._events.start(self._name)
            self._events.arguments("{")
            self._is_certain, self._has_arguments = True, False
        self._held.clear()

    def _in_content(self, char: str) -> None:
        """From here on, everything is."""
        self._events.content(char)
