"""One JSON object that may be a tool call, ``{"name": …, "arguments": {…}}``, character by character."""

from __future__ import annotations

from collections.abc import Callable, Collection

from minivllm.tools.events import WHITESPACE, EventList

_ARGUMENTS = ("arguments", "parameters")  # Hermes' word and Llama's; models mix them up
_KEYS = ("type", "name", *_ARGUMENTS)


class CallObject:
    """Reads one object and puts the call that it is into ``events``.

    The object is a call once its function is known and its arguments have begun. Until then its text is
    held, and it fails at the first character that a call can't have: held is no more than keys and a
    name, unless the arguments come before the name. The arguments' end is where their brackets balance:
    what is in them is for the client to check, as it is with every server.
    """

    def __init__(self, names: Collection[str], events: EventList) -> None:
        """The opening brace has been read, and nothing after it."""
        self.is_done = False
        """Whether the closing brace has been read."""
        self._names = names
        self._events = events
        self._held = ["{"]  # no call yet: this is content if it fails. After the arguments: what follows them
        self._name: str | None = None
        self._arguments: list[str] | None = None  # None: not begun. They come before the name: held here
        self._is_streaming = False  # inside arguments that are certain
        self._seen: set[str] = set()
        self._key = ""
        self._step: Callable[[str], bool] = self._before_key
        self._text = ""
        self._depth = 0
        self._in_string = self._is_escaped = False

    @property
    def held(self) -> str:
        """What was read and isn't part of a call: content, if the object ends here."""
        return "".join(self._held)

    def push(self, char: str) -> bool:
        """Read a character; False where it can't be part of the object: the object failed, and ``held``
        is content."""
        if self._is_streaming:
            self._events.arguments(char)
            return self._in_arguments(char)
        self._held.append(char)
        if not self._step(char):
            self._held.pop()
            return False
        return True

    def _before_key(self, char: str) -> bool:
        if char == '"':
            self._text, self._step = "", self._in_key
        return char == '"' or char in WHITESPACE

    def _in_key(self, char: str) -> bool:
        if char != '"':
            self._text += char
            return any(key.startswith(self._text) for key in _KEYS)
        self._key, self._step = self._text, self._before_colon
        kind = "arguments" if self._key in _ARGUMENTS else self._key
        is_new = kind not in self._seen
        self._seen.add(kind)
        return self._key in _KEYS and is_new

    def _before_colon(self, char: str) -> bool:
        if char == ":":
            self._step = self._before_value
        return char == ":" or char in WHITESPACE

    def _before_value(self, char: str) -> bool:
        if char in WHITESPACE:
            return True
        if self._key in _ARGUMENTS:
            if char == "{":
                self._begin_arguments()
            return char == "{"
        self._text, self._step = "", self._in_word
        return char == '"'

    def _in_word(self, char: str) -> bool:
        """The value of "name" or "type"."""
        words = self._names if self._key == "name" else ("function",)
        if char != '"':
            self._text += char
            return any(word.startswith(self._text) for word in words)
        self._step = self._after_value
        if self._text not in words:
            return False
        if self._key == "name":
            self._name = self._text
            if self._arguments is not None:
                self._commit()
        return True

    def _begin_arguments(self) -> None:
        self._step, self._depth = self._in_arguments, 1
        self._arguments = ["{"]
        if self._name is not None:
            self._is_streaming = True
            self._commit()

    def _in_arguments(self, char: str) -> bool:
        if not self._is_streaming:
            assert self._arguments is not None
            self._arguments.append(char)
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._step, self._is_streaming = self._after_value, False
        return True

    def _after_value(self, char: str) -> bool:
        if char == ",":
            self._step = self._before_key
        elif char == "}":
            if self._name is None:
                return False
            if self._arguments is None:  # a function without parameters, and a model that left them out
                self._arguments = ["{}"]
                self._commit()
            self._held.clear()
            self.is_done = True
        return char in ",}" or char in WHITESPACE

    def _commit(self) -> None:
        assert self._name is not None
        assert self._arguments is not None
        self._events.start(self._name)
        self._events.arguments("".join(self._arguments))
        self._held.clear()
