"""A comparison that nobody measured, in the shape of one that somebody did."""

from __future__ import annotations

from minivllm_bench.compare_config import MODES
from minivllm_bench.points import empty_agent_run, empty_point
from minivllm_bench.results import AgentRun, Comparison, Contender, Point
from minivllm_bench.steady_state import Waits

USERS = (1, 2, 4, 8, 16, 32, 50, 64, 128)
SLOTS = {"paged": 150, "contiguous": 11, "sequential-4": 4, "sequential-1": 1}


def waits(typical: float, *, longest: float = 20.0) -> Waits:
    """Of a server whose typical wait is this; what is longer than the run isn't known."""
    known = [value if value < longest else None for value in (typical, 1.5 * typical, 2 * typical)]
    is_known = known[2] is not None
    return {
        "p50": known[0],
        "p90": known[1],
        "p99": known[2],
        "longest": 2 * typical if is_known else longest,
        "observed": 30,
        "waiting": 0 if is_known else 7,
    }


def point(mode: str, users: int) -> Point:
    """A batch grows with its users up to the mode's slots."""
    batch = min(users, SLOTS.get(mode, 6))
    throughput = 85.0 * batch / (1 + batch / 6.2) * 1.16
    queue = max(0, users - batch) * 192 / throughput
    gap = batch / throughput
    result = empty_point(users)
    result["figures"] = {
        "window": (1.0, 13.0),
        "requests": 40,
        "completed": 30,
        "failed": 0,
        "errors": {},
        "output_throughput": throughput,
        "user_throughput": throughput / users,
        "ttft": waits(0.1 + 0.02 * batch + queue),
        "itl": {"mean": gap, "p50": gap, "p90": 1.5 * gap, "p99": 2.5 * gap},
    }
    result["occupancy"] = {
        "running_mean": 0.98 * batch,
        "running_max": batch,
        "waiting_mean": float(users - batch),
        "waiting_max": users - batch,
        "kv_usage_mean": 0.5,
        "kv_usage_max": 0.6,
    }
    result["client_cpu"] = 0.05
    return result


def agent_run(users: int, *seconds: float | None) -> AgentRun:
    """20 steps; those that took None seconds came to step 7."""
    run = empty_agent_run(users, 20)
    run["seconds"] = list(seconds)
    run["steps_done"] = [7 if value is None else 20 for value in seconds]
    run["limit"] = 90.0
    run["prompt_tokens"], run["cached_tokens"] = 28_000, 25_000 if None not in seconds else 0
    return run


def contender(name: str, *, label: str | None = None) -> Contender:
    """A mode, or a peer, that has been measured everywhere."""
    is_peer = name not in MODES
    seconds = 11.0 if name == "paged" else 43.0
    return {
        "name": name,
        "label": label or (name if is_peer else MODES[name].label),
        "is_peer": is_peer,
        "command": ["http://peer.example:11434"] if is_peer else ["minivllm", "serve", *MODES[name].flags],
        "start_seconds": None if is_peer else 3.4,
        "failed": None,
        "points": [point(name, users) for users in USERS],
        "agents": [agent_run(1, seconds), agent_run(8, *([50.0] * 8 if name == "paged" else [None] * 8))],
    }


def comparison(*contenders: Contender) -> Comparison:
    """Of all modes, unless others are given."""
    return {
        "date": "2026-01-01T00:00:00+00:00",
        "command": "minivllm bench compare",
        "version": "0.1.0, commit 0123456789ab",
        "model": "Made-Up-135M",
        "settings": {
            "workload": "memoryless",
            "seconds": 12.0,
            "max_model_len": 4096,
            "kv_cache_memory": 2**30,
            "agent_steps": 20,
        },
        "machine": {"cpu": "Imaginary <CPU> & Co", "cores": 2, "vector instructions": ["avx2", "fma"]},
        "busy_processes": {},
        "seconds": 800.0,
        "is_complete": True,
        "contenders": list(contenders) or [contender(name) for name in MODES],
    }
