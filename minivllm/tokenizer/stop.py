"""Finding stop strings in a text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Lets text through up to the first stop string, and holds back what may become one.

    The first stop string is the one that is complete first, wherever the pieces were cut; of several
    complete at the same character, the longest. Held back is the longest end of the text that begins
    some stop string, and nothing more.

    A character costs O(1) on average and memory grows only with how much of a stop string was seen,
    so that neither long stop strings nor repetitive text can make it slow.
    """

    def __init__(self, stop_strings: Sequence[str], *, shows_stop: bool = False) -> None:
        """With ``shows_stop`` the stop string is the end of the text that comes out."""
        self._shows_stop = shows_stop
        self._searches = [_Search(stop) for stop in stop_strings]
        self._held = ""
        self.is_stopped = False
        """Whether a stop string was found. From then on, no text comes out."""

    def push(self, text: str) -> str:
        """The text that is now certain to come before any stop string."""
        if self.is_stopped:
            return ""
        if not self._searches:
            return text
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            longest = 0
            for search in self._searches:
                if search.advance(char):
                    longest = max(longest, len(search.stop))
            if longest:
                self.is_stopped = True
                self._held = ""
                return pending[: position if self._shows_stop else position - longest]
        num_certain = len(pending) - max(search.num_matched for search in self._searches)
        self._held = pending[num_certain:]
        return pending[:num_certain]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Knuth-Morris-Pratt: how much of one string the text's end matches."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._borders = [0]
        """``_borders[i]``: length of the longest proper prefix of ``stop[:i + 1]`` that also ends it.
        As far as it was needed."""

    def advance(self, char: str) -> bool:
        """Take the text's next character; whether it completes the string."""
        self.num_matched = self._extend(self.num_matched, char)
        if self.num_matched == len(self.stop):
            return True
        if self.num_matched > len(self._borders):
            self._borders.append(self._extend(self._borders[-1], char))
        return False

    def _extend(self, num_matched: int, char: str) -> int:
        while num_matched and self.stop[num_matched] != char:
            num_matched = self._borders[num_matched - 1]
        return num_matched + (self.stop[num_matched] == char)
