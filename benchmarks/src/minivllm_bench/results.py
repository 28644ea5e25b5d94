"""What ``minivllm bench compare`` writes to ``compare.json``: a comparison as it grows, point by point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from minivllm_bench.steady_state import SteadyState


class Occupancy(TypedDict):
    """What ``/health`` said during a window, every half second."""

    running_mean: float
    running_max: int
    """Sequences in the batch."""
    waiting_mean: float
    waiting_max: int
    """Requests that had no place in it yet."""
    kv_usage_mean: float
    kv_usage_max: float
    """Share of the KV blocks that were taken, reserved ones included."""


class Point(TypedDict):
    """One number of users on one contender."""

    users: int
    failed: str | None
    """Why there are no figures, or not all."""
    skipped: str | None
    """Why it wasn't tried."""
    figures: SteadyState | None
    occupancy: Occupancy | None
    """None where the server doesn't tell."""
    client_cpu: float | None
    """Of one core, how much the load generator used."""


class AgentRun(TypedDict):
    """So many agents at once on one contender, each with its steps one after the other."""

    users: int
    steps: int
    failed: str | None
    skipped: str | None
    seconds: list[float | None]
    """From first step sent to last step answered, of each agent; None: not done in time."""
    steps_done: list[int]
    limit: float | None
    """When those that weren't done were broken off, seconds."""
    prompt_tokens: int
    """Of all steps that were answered."""
    cached_tokens: int
    """Of those, found in the prefix cache."""


class Contender(TypedDict):
    """One of the engine's modes, or a peer."""

    name: str
    label: str
    is_peer: bool
    command: list[str]
    """That started it; of a peer, its URL."""
    start_seconds: float | None
    failed: str | None
    """Why it couldn't be measured, or not to the end."""
    points: list[Point]
    agents: list[AgentRun]


class Comparison(TypedDict):
    """All of it."""

    date: str
    command: str
    version: str
    model: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    busy_processes: dict[str, float]
    seconds: float | None
    """How long it took, once it is over."""
    is_complete: bool
    """False while it runs, and where it was broken off."""
    contenders: list[Contender]


def save(comparison: Comparison, path: Path) -> None:
    """Write it whole or not at all: who reads meanwhile, or interrupts, finds the last whole one."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(comparison, indent=1) + "\n")
    beside.replace(path)


def load(path: Path) -> Comparison:
    """What :func:`save` wrote."""
    comparison: Comparison = json.loads(path.read_text())
    return comparison
