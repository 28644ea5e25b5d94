"""How long a call takes on its device: CUDA events around a replayed graph, or perf_counter on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 3, 200


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one call."""

    median: float
    """Seconds, over rounds."""
    best: float
    method: str
    """"graph" (a CUDA graph's replays: no launches), "events" (launched one by one) or "clock" (a CPU)."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(calls: Sequence[Call], device: torch.device, seconds: float, *, as_graph: bool) -> Timing:
    """Time of one of ``calls``, which do the same on different memory and are run in turns.

    Args:
        calls: together they should touch more memory than the device's cache holds.
        seconds: about how long to measure.
        as_graph: on CUDA, capture all of them in one graph, as an engine does with a decode step:
            short kernels take longer to launch than to run. Where that fails, they are launched.
    """
    for call in calls:
        call()  # compiles, fills caches
    synchronize(device)
    if device.type != "cuda":
        return _on_cpu(calls, seconds)
    graph = _capture(calls) if as_graph else None
    # Results are kept through a round: freed at once, all calls would write to the same memory.
    run = graph.replay if graph is not None else lambda: [call() for call in calls]
    first = _round(run)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(first, 1e-9))))
    times = [_round(run) / len(calls) for _ in range(rounds)]
    return Timing(statistics.median(times), min(times), "events" if graph is None else "graph")


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = [call() for call in calls]
    except RuntimeError:  # a call that waits for the device can't be captured
        torch.cuda.synchronize()
        return None
    del results
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _round(run: Call) -> float:
    """Seconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def _on_cpu(calls: Sequence[Call], seconds: float) -> Timing:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < MIN_ROUNDS or time.perf_counter() < end:
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) / len(calls))
    return Timing(statistics.median(times), min(times), "clock")
