"""What a parser finds in a model's text, and what all parsers have in common."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol

WHITESPACE = " \t\r\n"
"""Between the parts of a call, and around the reasoning."""


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no tool call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call whose function is certain. Its arguments follow."""

    index: int
    """Of the answer's calls, from 0."""
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Content | CallStarted | Arguments


class ToolCallParser(Protocol):
    """Finds the tool calls in one answer. Made anew for each.

    The events are the same wherever the text is cut, but for how content and arguments are cut. A call
    is announced as soon as it is certain: a function that was offered, and its arguments begun. What is
    none after all is content, to the character. Arguments that go wrong later stay as far as they came,
    and aren't valid JSON then. Whitespace and separators beside calls are dropped. Time is linear in the
    text's length.
    """

    markers: ClassVar[tuple[str, ...]]
    """Texts that may be special tokens, and must be shown to the parser."""

    def __init__(self, names: Collection[str]) -> None:
        """``names``: the functions that may be called. A call of any other is content."""

    def push(self, text: str) -> list[Event]:
        """What more text brings."""

    def finish(self) -> list[Event]:
        """What was held back, when no more text comes."""


class EventList:
    """Collects events; neighbours of one kind are joined."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._kind: type[Content] | type[Arguments] = Content
        self._texts: list[str] = []
        self._events: list[Event] = []

    def content(self, text: str) -> None:
        """Add text that is no call."""
        self._add(Content, text)

    def start(self, name: str) -> None:
        """Begin the next call."""
        self._close()
        self._events.append(CallStarted(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Add to the last call's arguments."""
        self._add(Arguments, text)

    def take(self) -> list[Event]:
        """The events since the last time."""
        self._close()
        events, self._events = self._events, []
        return events

    def _add(self, kind: type[Content] | type[Arguments], text: str) -> None:
        if text:
            if kind is not self._kind:
                self._close()
                self._kind = kind
            self._texts.append(text)

    def _close(self) -> None:
        if self._texts:
            text = "".join(self._texts)
            is_content = self._kind is Content
            self._events.append(Content(text) if is_content else Arguments(self.num_calls - 1, text))
            self._texts.clear()
