"""How requests are sent: when they start, how many, for how long."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from minivllm.config import flag, option
from minivllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Load:
    """Either so many users or so many sessions a second, and an end.

    Raises ConfigError for a value that is out of its range, or where there is no end.
    """

    users: int | None = option(
        None, "closed loop: so many users, each of whom sends the next request when the last one has ended"
    )
    rate: float | None = option(
        None,
        "open loop: so many sessions (requests, where a session is one) start in a second on average, "
        "whether or not the server keeps up",
    )
    burstiness: float = option(
        1.0, "of the open loop; 1: a Poisson process, below 1: bursts, above 1: more even than that"
    )
    num_requests: int | None = option(None, "end when so many requests have been sent and have ended")
    duration: float | None = option(None, "send nothing more after so many seconds")
    drain: float = option(
        30.0, "seconds that the requests under way get after --duration; what hasn't ended then is broken off"
    )
    seed: int = option(0, "of lengths, words and arrival times: the same seed sends the same requests")

    def __post_init__(self) -> None:
        if (self.users is None) == (self.rate is None):
            raise ConfigError("give either --users (a closed loop) or --rate (an open loop)")
        if self.num_requests is None and self.duration is None:
            raise ConfigError("give --num-requests, --duration or both: the run has no end otherwise")
        for name in ("users", "num_requests"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, got {value}")
        for name in ("rate", "burstiness", "duration"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{flag(name)} must be above 0, got {value:g}")
        if not 0 <= self.drain < float("inf"):
            raise ConfigError(f"--drain must be at least 0, got {self.drain:g}")


def arrival_times(rate: float, burstiness: float, rng: random.Random) -> Iterator[float]:
    """When an open loop's sessions start, in seconds; endless.

    The gaps are gamma distributed with mean 1 / rate and shape ``burstiness``; with 1 they are exponential,
    which makes a Poisson process.
    """
    now = 0.0
    while True:
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        yield now
