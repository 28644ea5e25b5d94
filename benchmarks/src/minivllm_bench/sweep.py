"""One contender of a comparison: all its numbers of users, then its agents, within its share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from minivllm.errors import MinivllmError
from minivllm_bench.compare_config import CompareConfig
from minivllm_bench.points import empty_agent_run, empty_point
from minivllm_bench.results import AgentRun, Contender, Point

AGENT_SECONDS = 90.0
"""Agents that take longer are broken off."""

LEAST_WARM_UP = 2.0
"""With less time than this left before a window it isn't opened."""

LEAST_STEP_SECONDS = 0.5
"""With less time than this left for each step they aren't started."""

NO_TIME = "no time was left"


class Target(Protocol):
    """A server that runs, and how it is measured. Raises MinivllmError where it fails."""

    def point(self, users: int, warm_up: float, seconds: float, seed: int) -> Point:
        """A steady load of so many users, as of :func:`minivllm_bench.points.measure_point`."""
        ...

    def agents(self, users: int, steps: int, limit: float, seed: int) -> AgentRun:
        """So many agents at once."""
        ...


@dataclass(slots=True)
class Budget:
    """Time that is left of what was given to a comparison."""

    end: float
    clock: Callable[[], float] = time.monotonic

    def left(self) -> float:
        """Seconds; below 0 when it is over."""
        return self.end - self.clock()

    def share(self, contenders_left: int) -> Budget:
        """An equal part of what is left: time that one contender doesn't need goes to the next ones."""
        return Budget(self.clock() + self.left() / contenders_left, self.clock)


def longest_warm_up(users: int) -> float:
    """Seconds after which a window begins in any case."""
    return 5.0 + 0.2 * users


Progress = Callable[[str], None]
"""Told what begins."""


def sweep(
    contender: Contender,
    target: Target,
    config: CompareConfig,
    budget: Budget,
    *,
    begin: Progress,
    save: Callable[[], None],
) -> None:
    """Measure a contender, and write each point into it as it is done.

    A failure ends the contender's points; the rest of them say so. What doesn't fit into the time is left
    out.

    Args:
        begin: told each point before it is measured.
        save: called after each.
    """
    for users in config.user_counts:
        warm_up = min(longest_warm_up(users), budget.left() - config.seconds)
        begin(f"{contender['label']}, {users} user{'s' * (users > 1)}")
        if contender["failed"] is not None:
            point = empty_point(users, skipped="the server had failed before")
        elif warm_up < LEAST_WARM_UP:
            point = empty_point(users, skipped=NO_TIME)
        else:
            try:
                point = target.point(users, warm_up, config.seconds, _seed(config, users))
            except MinivllmError as error:
                contender["failed"] = str(error)
                point = empty_point(users, failed=str(error))
        contender["points"].append(point)
        save()
    for users in config.agent_user_counts:
        begin(f"{contender['label']}, {users} agent{'s' * (users > 1)}")
        limit = min(AGENT_SECONDS, budget.left())
        if contender["failed"] is not None:
            run = empty_agent_run(users, config.agent_steps, skipped="the server had failed before")
        elif limit < LEAST_STEP_SECONDS * config.agent_steps:
            run = empty_agent_run(users, config.agent_steps, skipped=NO_TIME)
        else:
            try:
                run = target.agents(users, config.agent_steps, limit, _seed(config, -users))
            except MinivllmError as error:
                contender["failed"] = str(error)
                run = empty_agent_run(users, config.agent_steps, failed=str(error))
        contender["agents"].append(run)
        save()


def _seed(config: CompareConfig, users: int) -> int:
    """Another one for each point, so that no prompt is in a prefix cache, and the same in each mode."""
    return config.seed * 1_000_003 + users
