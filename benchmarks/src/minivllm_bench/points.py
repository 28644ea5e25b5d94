"""Measures one point of a comparison on a server that runs: a steady load, or agents."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from minivllm_bench.generator import Ask, LoadGenerator
from minivllm_bench.load import Load
from minivllm_bench.records import RequestRecord
from minivllm_bench.results import AgentRun, Occupancy, Point
from minivllm_bench.steady_state import steady_state
from minivllm_bench.workloads import Sessions, Workload, agent

_TICK = 0.05
_HEALTH_SECONDS = 0.5

Health = Callable[[], Awaitable[dict[str, Any] | None]]
"""What a server says of itself; None where it doesn't."""


def empty_point(users: int, *, failed: str | None = None, skipped: str | None = None) -> Point:
    """A point without figures, and why."""
    return {
        "users": users,
        "failed": failed,
        "skipped": skipped,
        "figures": None,
        "occupancy": None,
        "client_cpu": None,
    }


def empty_agent_run(
    users: int, steps: int, *, failed: str | None = None, skipped: str | None = None
) -> AgentRun:
    """A run without figures, and why."""
    return {
        "users": users,
        "steps": steps,
        "failed": failed,
        "skipped": skipped,
        "seconds": [],
        "steps_done": [],
        "limit": None,
        "prompt_tokens": 0,
        "cached_tokens": 0,
    }


async def read_health(url: str) -> dict[str, Any] | None:
    """minivllm's ``/health``; None from others, and where it doesn't answer."""
    return await asyncio.to_thread(_read_health, url)


def _read_health(url: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=2) as response:
            health = json.load(response)
    except (OSError, ValueError):
        return None
    return health if isinstance(health, dict) and "num_running" in health else None


async def measure_point(
    ask: Ask,
    health: Health,
    workload: Workload,
    *,
    users: int,
    warm_up: float,
    seconds: float,
    seed: int,
) -> Point:
    """Keep a server busy with so many users until it is in its stride, and for ``seconds`` more, which count.

    ``warm_up`` is the longest that it gets to be so.

    It is when each user has a first token, or as many answers are done as are under way: who still waits then
    is in a queue, and not among prompts that are being read.

    Raises:
        MinivllmError: the server can't be reached, or fails request after request.
    """
    load = Load(users=users, duration=warm_up + seconds + 1, seed=seed)
    generator = LoadGenerator(ask, workload, load)
    async with _running(generator) as run:
        await run.wait_until(lambda now: now >= warm_up or _is_in_stride(generator.records, users))
        start = run.now()
        samples: list[dict[str, Any]] = []
        sampling = asyncio.create_task(_sample(health, samples))
        try:
            await run.wait_until(lambda now: now >= start + seconds)
            end = run.now()
        finally:
            sampling.cancel()
    figures = steady_state(generator.records, users, start, end)
    point = empty_point(users)
    if figures["failed"]:
        error = max(figures["errors"], key=figures["errors"].__getitem__)
        point["failed"] = f"{figures['failed']} of {figures['requests']} requests failed: {error}"
    point["figures"] = figures
    point["occupancy"] = occupancy(samples)
    point["client_cpu"] = generator.cpu_share
    return point


async def measure_agents(ask: Ask, *, users: int, steps: int, limit: float, seed: int) -> AgentRun:
    """So many agents at once, each with so many steps; those that aren't done by ``limit`` are broken off.

    One that is done or has failed leaves: the others have the server to themselves.

    Raises:
        MinivllmError: the server can't be reached, or fails request after request.
    """

    def sessions(rng: random.Random) -> Sessions:
        return itertools.islice(agent(steps)(rng), users)

    generator = LoadGenerator(ask, sessions, Load(users=users, duration=limit, seed=seed))
    async with _running(generator) as run:
        await run.wait_until(lambda now: now >= limit)
    result = empty_agent_run(users, steps)
    for session in range(users):
        records = [record for record in generator.records if record.session == session]
        done = sum(record.is_complete for record in records)
        result["steps_done"].append(done)
        last = records[-1].finished if done == steps else None
        result["seconds"].append(None if last is None else last - records[0].sent)
        failure = next((record.error for record in records if record.error is not None), None)
        result["failed"] = result["failed"] or failure
        result["prompt_tokens"] += sum(record.prompt_tokens for record in records if record.is_complete)
        result["cached_tokens"] += sum(record.cached_tokens for record in records if record.is_complete)
    result["limit"] = limit
    return result


class _Run:
    """A load that is on its way."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()

    def now(self) -> float:
        """Seconds since it began."""
        return self._loop.time() - self._start

    async def wait_until(self, is_reached: Callable[[float], bool]) -> None:
        """Until the condition holds or the load has ended; raises what ended it."""
        while not self._task.done() and not is_reached(self.now()):
            await asyncio.wait({self._task}, timeout=_TICK)
        if self._task.done():
            self._task.result()


@contextlib.asynccontextmanager
async def _running(generator: LoadGenerator) -> AsyncIterator[_Run]:
    """Start a load, and break it off at the end of the block."""
    task = asyncio.create_task(generator.run())
    try:
        yield _Run(task)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _is_in_stride(records: Sequence[RequestRecord], users: int) -> bool:
    if len(records) < users:
        return False
    done = sum(record.finished is not None for record in records)
    under_way = sum(bool(record.chunk_times) and record.finished is None for record in records)
    return done >= max(1, under_way) or all(record.chunk_times for record in records[:users])


async def _sample(health: Health, samples: list[dict[str, Any]]) -> None:
    while (sample := await health()) is not None:
        samples.append(sample)
        await asyncio.sleep(_HEALTH_SECONDS)


def occupancy(samples: Sequence[dict[str, Any]]) -> Occupancy | None:
    """Means and maxima of what ``/health`` said."""
    if not samples:
        return None
    running, waiting, usage = (
        [sample[name] for sample in samples] for name in ("num_running", "num_waiting", "kv_cache_usage")
    )
    return {
        "running_mean": statistics.fmean(running),
        "running_max": max(running),
        "waiting_mean": statistics.fmean(waiting),
        "waiting_max": max(waiting),
        "kv_usage_mean": statistics.fmean(usage),
        "kv_usage_max": max(usage),
    }
