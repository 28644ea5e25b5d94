"""What the device and the host do during steps, as torch's profiler (CUPTI) saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

SHORT_GAP = 10e-6
"""Seconds between two kernels that are their launch, not idleness: a graph's own gaps are 1 to 2 µs."""
WAITS = ("Synchronize", "cudaMemcpyAsync")
"""In the names of the runtime's calls that wait: copying results to ordinary memory does, too."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Seconds of one step, on average."""

    busy: float
    """The device works, or is between two kernels less than ``SHORT_GAP`` apart."""
    working: float
    """The device works: the union of its kernels and copies."""
    host: float
    """The host doesn't wait for the device. The profiler's own cost is in it."""


def covered(intervals: Iterable[Interval], gap: float = 0.0) -> float:
    """Length of the union of (start, end), with gaps of up to ``gap`` between them closed."""
    total, reached = 0.0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached + gap:
            total += end - start
        elif end > reached:
            total += end - reached
        reached = end if reached is None else max(reached, end)
    return total


def profile_steps(step: Callable[[], object], count: int, seconds: Callable[[], float]) -> StepProfile:
    """Run ``count`` steps under the profiler, on a CUDA device.

    Args:
        seconds: a clock.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = seconds()
        for _ in range(count):
            step()
        wall = seconds() - start
        torch.cuda.synchronize()
    return summarise(profiler.events() or [], count, wall)


def summarise(events: Iterable[Any], count: int, wall: float) -> StepProfile:
    """From the profiler's events, of which some are the device's and some the host's calls."""
    work: list[Interval] = []
    waits: list[Interval] = []
    for event in events:
        if getattr(event, "is_user_annotation", False):
            continue
        interval = event.time_range.start / 1e6, event.time_range.end / 1e6
        if event.device_type.name == "CUDA":
            work.append(interval)
        elif any(name in event.name for name in WAITS):
            waits.append(interval)
    return StepProfile(
        busy=covered(work, SHORT_GAP) / count,
        working=covered(work) / count,
        host=(wall - covered(waits)) / count,
    )
