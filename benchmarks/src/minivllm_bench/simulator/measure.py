"""One simulated run, and its figures: those that ``minivllm bench`` takes of a real one."""

from __future__ import annotations

import math
import random
from typing import Any, TypedDict

from minivllm_bench.load import arrival_times
from minivllm_bench.metrics import summarise
from minivllm_bench.points import empty_point, occupancy
from minivllm_bench.records import RequestRecord
from minivllm_bench.results import Occupancy, Point
from minivllm_bench.simulator.deployment import Deployment
from minivllm_bench.simulator.simulation import Simulation
from minivllm_bench.steady_state import SteadyState, steady_state
from minivllm_bench.sweep import longest_warm_up
from minivllm_bench.workloads import Workload


class RatePoint(TypedDict):
    """One rate of an open loop."""

    rate: float
    """Sessions that begin in a second."""
    failed: str | None
    figures: SteadyState
    """Of the window after the warm-up."""
    summary: dict[str, Any]
    """Of the whole run."""
    occupancy: Occupancy | None


def run_users(deployment: Deployment, workload: Workload, *, users: int, seconds: float, seed: int) -> Point:
    """A closed loop, as ``minivllm bench compare`` measures it: until it is in its stride, and ``seconds``
    more."""
    engine, clock = deployment.engine()
    sessions = workload(random.Random(f"{seed}/sessions"))
    simulation = Simulation(engine, clock, users=users, sessions=sessions)
    warm_up = longest_warm_up(users)
    records = simulation.run(warm_up + seconds)
    engine.check_integrity()
    start = min(_in_stride(records, users), warm_up)
    figures = steady_state(records, users, start, start + seconds)
    point = empty_point(users, failed=_failure(figures))
    point["figures"] = figures
    point["occupancy"] = _occupancy(simulation, start)
    return point


def run_rate(
    deployment: Deployment,
    workload: Workload,
    *,
    rate: float,
    burstiness: float,
    seconds: float,
    seed: int,
) -> RatePoint:
    """An open loop. Its first fifth, in which the engine fills, is not part of the window."""
    engine, clock = deployment.engine()
    sessions = workload(random.Random(f"{seed}/sessions"))
    times = arrival_times(rate, burstiness, random.Random(f"{seed}/arrivals"))
    simulation = Simulation(engine, clock, arrivals=zip(times, sessions, strict=False))
    end = 1.25 * seconds
    records: list[RequestRecord] = simulation.run(end)
    engine.check_integrity()
    figures = steady_state(records, 1, end - seconds, end)
    return {
        "rate": rate,
        "failed": _failure(figures),
        "figures": figures,
        "summary": summarise(records, end),
        "occupancy": _occupancy(simulation, end - seconds),
    }


def _in_stride(records: list[RequestRecord], users: int) -> float:
    """When each user had a first token, or as many answers were done as were under way; infinite: never."""
    firsts = [record.first_token for record in records if record.first_token is not None]
    ends = [record.finished for record in records if record.finished is not None]
    num_begun = num_done = 0
    for moment, is_end in sorted([*((time, False) for time in firsts), *((time, True) for time in ends)]):
        num_begun, num_done = num_begun + (not is_end), num_done + is_end
        if num_done >= max(1, num_begun - num_done):
            return moment
        if all(r.first_token is not None and r.first_token <= moment for r in records[:users]):
            return moment
    return math.inf


def _failure(figures: SteadyState) -> str | None:
    if not figures["failed"]:
        return None
    error = max(figures["errors"], key=figures["errors"].__getitem__)
    return f"{figures['failed']} of {figures['requests']} requests failed: {error}"


def _occupancy(simulation: Simulation, start: float) -> Occupancy | None:
    return occupancy(
        [
            {
                "num_running": stats.num_running,
                "num_waiting": stats.num_waiting,
                "kv_cache_usage": stats.kv_cache_usage,
            }
            for time, stats in simulation.stats
            if time >= start
        ]
    )
