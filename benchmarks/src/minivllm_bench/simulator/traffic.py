"""Who sends what, when: sessions, and the moments at which they begin.

A closed loop has a number of users, each of whom begins the next session when one has ended: the load
adapts to the server. An open loop has sessions that begin when they will, whatever the server does: what
traffic from many independent people is like, and what a server that is too slow drowns in.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from minivllm_bench.workloads import Session, Sessions


class Arrival(NamedTuple):
    """One session begins."""

    time: float
    """Seconds since the run began."""
    session: Session


def poisson(sessions: Sessions, rate: float, rng: random.Random) -> Iterator[Arrival]:
    """Sessions that begin independently of each other, ``rate`` a second on average, without end."""
    time = 0.0
    for session in sessions:
        time += rng.expovariate(rate)
        yield Arrival(time, session)
