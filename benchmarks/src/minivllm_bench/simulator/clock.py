"""Time that passes only when a simulation says so."""

from __future__ import annotations


class VirtualClock:
    """Seconds; call it to read it, as ``time.monotonic``.

    It starts at 1: in a request's metrics, a time of 0 means "never".
    """

    START = 1.0

    def __init__(self) -> None:
        self.now = self.START

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """So much later."""
        self.now += seconds

    def advance_to(self, moment: float) -> None:
        """Not before ``moment``; nothing happens where that has passed."""
        self.now = max(self.now, moment)
