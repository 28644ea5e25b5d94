"""What the parsers of tool calls have in common: characters one by one, and text that may become a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

from minivllm.tools.call_object import CallObject
from minivllm.tools.events import Event, EventList


class HeldTextParser(ABC):
    """A machine whose state is the method that takes the next character.

    Text that may belong to a call is held back; where no call comes of it, it is content.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._events = EventList()
        self._step: Callable[[str], None] = self._between
        self._held: list[str] = []  # content, unless a call follows

    def push(self, text: str) -> list[Event]:
        """See :class:`minivllm.tools.events.ToolCallParser`."""
        for char in text:
            self._step(char)
        return self._events.take()

    @abstractmethod
    def _between(self, char: str) -> None:
        """At the start, and after a call."""

    @abstractmethod
    def _in_content(self, char: str) -> None:
        """Where no call is being read."""

    def _give_up(self, char: str) -> None:
        """No call: what was held is content, and ``char`` is, or begins something."""
        self._release()
        self._step = self._in_content
        self._in_content(char)

    def _release(self) -> None:
        self._events.content("".join(self._held))
        self._held.clear()


class CallObjectParser(HeldTextParser):
    """Of calls that are JSON objects, with tags around or before them."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._tag = ""  # as much of a tag as was read, at the end of what is held
        self._call = CallObject(names, self._events)

    @abstractmethod
    def _after_object(self) -> None:
        """An object is complete."""

    def _begin_object(self) -> None:
        """After its opening brace."""
        self._call = CallObject(self._names, self._events)
        self._step = self._in_call

    def _in_call(self, char: str) -> None:
        num_calls = self._events.num_calls
        is_part = self._call.push(char)
        if self._events.num_calls > num_calls:
            self._held.clear()
        if not is_part:
            self._held.append(self._call.held)
            self._give_up(char)
        elif self._call.is_done:
            self._after_object()

    def _hold_unread(self) -> None:
        """At the end of the text: what of an object is not certain to be a call is held like the rest."""
        if self._step == self._in_call:
            self._held.append(self._call.held)
