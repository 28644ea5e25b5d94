"""The operator's questions: how many users, how many GPUs, what paging is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minivllm_bench.results import Point
from minivllm_bench.simulator.deployment import Deployment
from minivllm_bench.simulator.measure import run_rate, run_users
from minivllm_bench.steady_state import SteadyState
from minivllm_bench.workloads import Workload

MOST_USERS = 65536
MOST_GPUS = 1024
PRECISION = 0.02
"""Of the number of users that a search ends with."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the 99th percentile must keep, in seconds; None: any."""

    ttft: float | None = None
    itl: float | None = None

    def are_kept_by(self, figures: SteadyState) -> bool:
        """A percentile that isn't known, because requests still waited, is too long, whatever the limits;
        and a failure keeps none."""
        if figures["failed"] or not figures["completed"] or figures["ttft"]["p99"] is None:
            return False
        pairs = ((self.ttft, figures["ttft"]["p99"]), (self.itl, figures["itl"]["p99"]))
        return all(limit is None or (value is not None and value <= limit) for limit, value in pairs)

    def __str__(self) -> str:
        parts = (("TTFT", self.ttft), ("ITL", self.itl))
        return " and ".join(f"p99 {name} <= {limit * 1e3:g} ms" for name, limit in parts if limit is not None)


def largest(is_good: Callable[[int], bool], most: int, *, precision: float = 0.0) -> int:
    """The largest number from 1 to ``most`` for which it holds, to within ``precision``; 0 if for none.

    It is taken to hold for all smaller ones, too: the number is doubled until it doesn't, and then the gap is
    halved.
    """
    low, high = 0, 1
    while high <= most and is_good(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(1, precision * low):
        middle = (low + high) // 2
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return low


def users_within(
    limits: Limits, deployment: Deployment, workload: Workload, *, seconds: float, seed: int
) -> int:
    """The most users of a closed loop that one device serves within the limits."""

    def is_good(users: int) -> bool:
        point = run_users(deployment, workload, users=users, seconds=seconds, seed=seed)
        return point["figures"] is not None and limits.are_kept_by(point["figures"])

    return largest(is_good, MOST_USERS, precision=PRECISION)


def gpus_for(
    rate: float,
    limits: Limits,
    deployment: Deployment,
    workload: Workload,
    *,
    burstiness: float,
    seconds: float,
    seed: int,
) -> int | None:
    """The fewest replicas that serve so many sessions a second within the limits; None: not even 1024.

    Each session goes to any of them with equal chance: n replicas see independent streams of rate / n. With a
    burstiness of 1 that is exact, a Poisson process split at random being Poisson processes.
    """

    def is_too_few(replicas: int) -> bool:
        point = run_rate(
            deployment, workload, rate=rate / replicas, burstiness=burstiness, seconds=seconds, seed=seed
        )
        return not limits.are_kept_by(point["figures"])

    most = largest(is_too_few, MOST_GPUS)
    return None if most >= MOST_GPUS else most + 1


def worth_of_paging(deployment: Deployment, paged: Point | None, contiguous: Point | None) -> str | None:
    """What the same number of users gets with and without it, in words; None where one of them is missing."""
    if paged is None or contiguous is None:
        return None
    ours, theirs = paged["figures"], contiguous["figures"]
    if ours is None or theirs is None or not theirs["output_throughput"]:
        return None
    ledger = deployment.ledger()
    ratio = ours["output_throughput"] / theirs["output_throughput"]
    at_once = [0 if p["occupancy"] is None else p["occupancy"]["running_max"] for p in (paged, contiguous)]
    return (
        f"paging, with --max-model-len {ledger.max_model_len}: {ledger.num_seqs_contiguous} sequences fit at "
        f"once without it; of {paged['users']} users {at_once[0]} ran at once with it and {at_once[1]} "
        f"without, and it made {ratio:.2f} times the tokens"
    )
