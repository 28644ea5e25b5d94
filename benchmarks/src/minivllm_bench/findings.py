"""What a comparison says: curves, multiples, and the sentence above the report; only what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

from minivllm_bench.knee import crossing, knee
from minivllm_bench.results import AgentRun, Comparison, Contender, Occupancy, Point

BEST, BASELINE = "paged", "sequential-1"
HEADLINE_USERS = 50


class Findings:
    """Answers questions about a comparison. None, everywhere: it wasn't measured."""

    def __init__(self, comparison: Comparison) -> None:
        self._contenders = {contender["name"]: contender for contender in comparison["contenders"]}

    @property
    def contenders(self) -> list[Contender]:
        """All, in the order of measuring."""
        return list(self._contenders.values())

    @property
    def user_counts(self) -> list[int]:
        """Those that at least one contender was to be measured with."""
        return sorted({point["users"] for contender in self.contenders for point in contender["points"]})

    def label(self, name: str) -> str:
        """A contender as readers know it."""
        return self._contenders[name]["label"] if name in self._contenders else name

    def point(self, name: str, users: int) -> Point | None:
        """One number of users on one contender."""
        points = self._contenders[name]["points"] if name in self._contenders else []
        return next((point for point in points if point["users"] == users), None)

    def measured(self, name: str) -> Iterator[Point]:
        """The points that have figures."""
        points = self._contenders[name]["points"] if name in self._contenders else []
        return (point for point in points if point["figures"] is not None)

    def curve(self, name: str) -> dict[int, float]:
        """Output tokens per second of all users together; points with failed requests are left out."""
        return {
            point["users"]: point["figures"]["output_throughput"]
            for point in self.measured(name)
            if point["figures"] is not None and point["failed"] is None
        }

    def throughput(self, name: str, users: int) -> float | None:
        """Tokens per second of all users together."""
        return self.curve(name).get(users)

    def ratio(self, name: str, other: str, users: int) -> float | None:
        """How many times as many tokens one makes."""
        ours, theirs = self.throughput(name, users), self.throughput(other, users)
        return ours / theirs if ours is not None and theirs else None

    def peak(self, name: str) -> float | None:
        """The most tokens per second with any number of users."""
        return max(self.curve(name).values(), default=None)

    def peak_ratio(self, name: str, other: str) -> float | None:
        """The same as :meth:`ratio`, each at its best number of users."""
        ours, theirs = self.peak(name), self.peak(other)
        return ours / theirs if ours is not None and theirs else None

    def knee(self, name: str) -> int | None:
        """The users from which more hardly add throughput."""
        return knee(self.curve(name))

    def crossing(self, name: str, other: str) -> float | None:
        """The users from which one stays ahead of the other."""
        return crossing(self.curve(name), self.curve(other))

    def crossing_words(self, name: str, other: str) -> str | None:
        """From how many users on it is ahead; None where there is nothing to compare."""
        if not self.curve(name).keys() & self.curve(other).keys():
            return None
        ahead = self.crossing(name, other)
        if ahead is None:
            return f"ahead of {self.label(other)} at no number of users for good"
        users = "1 user" if ahead == 1 else f"{ahead:.2g} users" if ahead < 10 else f"{ahead:.0f} users"
        return f"ahead of {self.label(other)} from {users} on"

    def occupancy(self, name: str, users: int) -> Occupancy | None:
        """What the server said of its batch and its queue."""
        point = self.point(name, users)
        return None if point is None else point["occupancy"]

    def agents(self, name: str, users: int) -> AgentRun | None:
        """So many agents on one contender."""
        runs = self._contenders[name]["agents"] if name in self._contenders else []
        return next((run for run in runs if run["users"] == users), None)

    @property
    def agent_counts(self) -> list[int]:
        """Numbers of agents that were to be measured."""
        return sorted({run["users"] for contender in self.contenders for run in contender["agents"]})

    def headline_users(self) -> int | None:
        """50, if both ends of the comparison have it; else the most that both have."""
        both = self.curve(BEST).keys() & self.curve(BASELINE).keys()
        return HEADLINE_USERS if HEADLINE_USERS in both else max(both, default=None)

    def headline(self) -> str:
        """The comparison in a sentence or two."""
        users = self.headline_users()
        if users is None:
            return self._without_baseline()
        ours, theirs = self.throughput(BEST, users), self.throughput(BASELINE, users)
        assert ours is not None
        assert theirs is not None
        sentence = (
            f"With {users} user{'s' * (users > 1)} at once, paged memory and continuous batching make "
            f"{ours:,.0f} tokens a second, the Ollama-style baseline ({self.label(BASELINE)}) {theirs:,.0f}"
        )
        if theirs:
            sentence += f": {ours / theirs:.1f} times as many"
        ahead = self.crossing(BEST, BASELINE)
        if ahead is None:
            return f"{sentence}. They are ahead for good at no number of users that was measured."
        return f"{sentence}. They are ahead from {math.ceil(ahead)} user{'s' * (ahead > 1)} on."

    def _without_baseline(self) -> str:
        peaks = {name: self.peak(name) for name in self._contenders}
        best = max(peaks, key=lambda name: peaks[name] or 0.0, default=None)
        if best is None or peaks[best] is None:
            return "Nothing was measured."
        return f"{self.label(best)} makes {peaks[best]:,.0f} tokens a second at most; there is no baseline."
