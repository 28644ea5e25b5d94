"""The field's usual table: N users at once, 100 tokens in and 200 out, greedy, under each policy.

Time to first token (TTFT) counts from the moment when all have been queued; inter-token latency (ITL)
is the time between two tokens of a request. A run that its time doesn't suffice for is ended, and its
figures are those of what had run by then.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.gpu_parts.engine import EngineBench, checked_step, release
from benchmarks.gpu_parts.setting import Row, Setting, skipped
from minivllm.config import PRESETS
from minivllm.engine.engine import Engine

POLICIES: dict[str, dict[str, Any]] = {
    "paged, continuous": {},
    "contiguous, continuous": {"kv_allocation": "contiguous"},
    "contiguous, sequential (ollama)": PRESETS["ollama"],
}


def table(setting: Setting) -> Iterator[tuple[str, Row]]:
    """Every policy, all numbers of users."""
    bench = EngineBench(setting)
    left_runs = len(POLICIES) * len(setting.sizes.table_users)
    for policy, settings in POLICIES.items():
        engine, about = bench.make_engine(**settings)
        yield "engines", {"policy": policy, **about}
        serve(bench, engine, 2, 10.0)  # warm-up
        for users in setting.sizes.table_users:
            seconds = setting.seconds_left / left_runs
            left_runs -= 1
            if seconds < 1.0:
                yield skipped(f"{users} users, {policy}", "out of time")
                continue
            yield "runs", {"policy": policy, "users": users, **serve(bench, engine, users, seconds)}
        del engine
        release()


def serve(bench: EngineBench, engine: Engine, users: int, seconds: float) -> Row:
    """One run, of at most about so many seconds."""
    sizes = bench.setting.sizes
    request_ids = bench.add(engine, users, sizes.prompt_tokens, sizes.output_tokens)
    times: dict[str, list[float]] = {request_id: [] for request_id in request_ids}
    finished, most_running = 0, 0
    start = now = time.perf_counter()
    while engine.has_work and now - start < seconds:
        events = checked_step(engine)
        now = time.perf_counter()
        most_running = max(most_running, len(events))
        for event in events:
            times[event.request_id] += [now] * len(event.new_token_ids)
            finished += event.finish_reason is not None
    num_tokens = sum(map(len, times.values()))
    bench.drain(engine, request_ids)
    first = [moments[0] - start for moments in times.values() if moments]
    between = [b - a for moments in times.values() for a, b in pairwise(moments)]
    return {
        "finished": finished,
        "is_complete": finished == users,
        "seconds": now - start,
        "output_tokens": num_tokens,
        "tokens_per_s": num_tokens / (now - start),
        "most_at_once": most_running,
        "ttft_ms": summary(first),
        "itl_ms": summary(between),
    }


def summary(seconds: Sequence[float]) -> dict[str, float] | None:
    """Milliseconds: mean, and 50th and 99th percentile. None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return {
        "mean": statistics.fmean(ordered) * 1e3,
        "p50": ordered[(len(ordered) - 1) // 2] * 1e3,
        "p99": ordered[-(-99 * len(ordered) // 100) - 1] * 1e3,
    }
