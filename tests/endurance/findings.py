"""What a part of the endurance runs has measured, and which of its promises hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Promise:
    """Something that must hold, and what was seen."""

    text: str
    holds: bool
    seen: str
    takes_quiet: bool = False
    """Only a full run on a machine that does nothing else can show it: times, and memory over time."""


@dataclass
class Findings:
    """Of one part."""

    figures: dict[str, Any] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)

    def promise(self, text: str, holds: bool, seen: object, *, takes_quiet: bool = False) -> None:
        """Write down one more, and print it."""
        promise = Promise(text, bool(holds), str(seen), takes_quiet)
        self.promises.append(promise)
        print(f"  {'holds ' if holds else 'BROKEN'}  {text}: {promise.seen}", flush=True)

    def broken(self, *, quick: bool = False) -> list[Promise]:
        """Those that don't hold; of a quick run, without those that it can't show."""
        return [
            promise for promise in self.promises if not promise.holds and not (quick and promise.takes_quiet)
        ]

    def as_json(self) -> dict[str, Any]:
        """For the results file."""
        return {**self.figures, "promises": [asdict(promise) for promise in self.promises]}
