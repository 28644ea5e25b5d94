"""One Python literal turned into JSON, character by character."""

from __future__ import annotations

import json
from collections.abc import Callable

from minivllm.tools.events import WHITESPACE

MAX_DEPTH = 64
MAX_SCALAR_CHARS = 400
"""Of a number or a name. Strings have no limit: they pass through."""

_CONSTANTS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
_ESCAPES = {"n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", "a": "\\u0007", "v": "\\u000b"}
_ESCAPES |= {"\\": "\\\\", "'": "'", '"': '\\"', "/": "/", "\n": ""}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_CLOSING = {"[": "]", "{": "}"}


class PythonLiteral:
    """Reads a value: strings, numbers, True, False, None, lists, and dictionaries whose keys are strings.

    JSON's own spellings (``true``, ``"\\/"``) and line breaks in strings are read too. Not read are tuples
    and sets, which JSON lacks, octal escapes and ``\\N{…}``, which stay as they are, strings with prefixes
    or three quotes, and ``1_000``.
    """

    def __init__(self) -> None:
        self.is_done = False
        """Whether the last character was a comma or parenthesis after the value."""
        self.has_failed = False
        """Whether the last character can't be part of a value."""
        self._step: Callable[[str], str] = self._before_value
        self._open: list[str] = []  # the brackets that are
        self._comma = ""
        self._is_key = False
        self._may_close = False
        self._quote = ""
        self._held = ""

    @property
    def held(self) -> str:
        """What was read and hasn't come out yet: a scalar, or an escape, that has no end.

        Without the character at which the value failed.
        """
        return self._held

    def push(self, char: str) -> str:
        """The JSON that a character brings. Not to be called after the value is done, or has failed."""
        return self._step(char)

    def _before_value(self, char: str) -> str:
        if char in WHITESPACE:
            return ""
        if self._may_close and char == _CLOSING[self._open[-1]]:
            return self._close(char)
        comma, self._comma = self._comma, ""
        self._may_close = False
        if char in "\"'":
            self._quote, self._step = char, self._in_string
            return comma + '"'
        if self._is_key:
            return self._fail()
        if char in _CLOSING:
            if len(self._open) == MAX_DEPTH:
                return self._fail()
            self._open.append(char)
            self._is_key, self._may_close = char == "{", True
            return comma + char
        if char.isascii() and (char.isalnum() or char in "+-."):
            self._held, self._comma, self._step = char, comma, self._in_scalar
            return ""
        return self._fail()

    def _in_scalar(self, char: str) -> str:
        if char.isascii() and (char.isalnum() or char in "+-."):
            if len(self._held) == MAX_SCALAR_CHARS:
                return self._fail()
            self._held += char
            return ""
        value = _scalar(self._held)
        if value is None:
            return self._fail()
        value = self._comma + value
        self._held = self._comma = ""
        self._step = self._after_value
        return value + self._after_value(char)

    def _in_string(self, char: str) -> str:
        if char == self._quote:
            self._step = self._before_colon if self._is_key else self._after_value
            return '"'
        if char == "\\":
            self._held, self._step = char, self._in_escape
            return ""
        return json.dumps(char, ensure_ascii=False)[1:-1]

    def _in_escape(self, char: str) -> str:
        if char in _HEX_DIGITS:
            self._held += char
            self._step = self._in_hex
            return ""
        self._held, self._step = "", self._in_string
        known = _ESCAPES.get(char)
        return "\\\\" + json.dumps(char, ensure_ascii=False)[1:-1] if known is None else known

    def _in_hex(self, char: str) -> str:
        if not (char.isascii() and char in "0123456789abcdefABCDEF"):
            return self._fail()
        kind, digits = self._held[1], self._held[2:] + char
        if len(digits) < _HEX_DIGITS[kind]:
            self._held += char
            return ""
        code = int(digits, 16)
        if code > 0x10FFFF:
            return self._fail()
        self._held, self._step = "", self._in_string
        return json.dumps(chr(code))[1:-1]

    def _before_colon(self, char: str) -> str:
        if char == ":":
            self._is_key, self._step = False, self._before_value
            return ": "
        return "" if char in WHITESPACE else self._fail()

    def _after_value(self, char: str) -> str:
        if char in WHITESPACE:
            return ""
        if not self._open:
            self.is_done = char in ",)"
            return "" if self.is_done else self._fail()
        if char == ",":
            # Written before the next value: Python may end a list with a comma, JSON may not.
            self._comma, self._may_close, self._step = ", ", True, self._before_value
            self._is_key = self._open[-1] == "{"
            return ""
        return self._close(char) if char == _CLOSING[self._open[-1]] else self._fail()

    def _fail(self) -> str:
        self.has_failed = True
        return ""

    def _close(self, char: str) -> str:
        self._open.pop()
        self._comma, self._is_key, self._may_close = "", False, False
        self._step = self._after_value
        return char


def _scalar(text: str) -> str | None:
    """A constant or number in JSON, digit for digit; None where it is neither."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    sign, digits = ("-", text[1:]) if text[0] == "-" else ("", text.removeprefix("+"))
    mantissa, _, exponent = digits.replace("E", "e").partition("e")
    whole, point, fraction = mantissa.partition(".")
    if "e" in digits.lower() and not exponent.removeprefix("-" if "-" in exponent else "+").isdigit():
        return None
    if not (whole + fraction).isdigit() or (len(whole) > 1 and whole.startswith("0")):
        return None
    number = sign + (whole or "0") + (f".{fraction or '0'}" if point else "")
    return f"{number}e{exponent}" if exponent else number
