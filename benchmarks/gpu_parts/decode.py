"""Steady decode steps: how long they take, what they would take at the copy bandwidth, when the GPU idles.

The floor of a step is the time in which a copy moves as many bytes as the step has to read: the weights
but the embedding, and the keys and values of every sequence. The idle share is 1 - busy / step: the step's
time is taken without the profiler, the device's busy time with it (kernels take as long under it, but
launching them doesn't), and gaps of less than 10 µs between kernels count as busy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.gpu_parts.ceilings import copy_bandwidth
from benchmarks.gpu_parts.engine import EngineBench, checked_step
from benchmarks.gpu_parts.setting import Row, Setting, skipped
from benchmarks.gpu_parts.step_profile import profile_steps
from benchmarks.gpu_parts.timing import synchronize
from minivllm.engine.engine import Engine

WARM_UP_STEPS = 5
PROFILED_STEPS = 12


def decode(setting: Setting) -> Iterator[tuple[str, Row]]:
    """Each number of sequences at each context."""
    bandwidth = copy_bandwidth(setting)
    bench = EngineBench(setting)
    engine, about = bench.make_engine()
    yield "engine", about | {"read_bytes": bench.read_bytes, "copy_gb_per_s": bandwidth / 1e9}
    for users, context in setting.sizes.decodes:
        room = about["kv_tokens"] // (context + 2 * setting.sizes.decode_steps)
        if users > min(room, engine.scheduler.limits.max_num_seqs):
            yield skipped(f"{users} x {context}", f"the engine runs {room} such sequences at once")
            continue
        row = steady_steps(bench, engine, users, context)
        floor = (bench.read_bytes + users * context * bench.kv_bytes) / bandwidth
        row |= {"floor_ms": floor * 1e3, "share_of_floor": floor * 1e3 / row["step_ms"]}
        yield "steps", row


def steady_steps(bench: EngineBench, engine: Engine, users: int, context: int) -> Row:
    """Steps in which every sequence has ``context`` tokens on average, and none begins or ends."""
    steps = bench.setting.sizes.decode_steps
    preemptions = engine.stats().num_preemptions
    margin = WARM_UP_STEPS + steps // 2
    request_ids = bench.add(engine, users, max(context - margin, 1), 4 * steps + 4 * PROFILED_STEPS)
    begun: set[str] = set()
    start = time.perf_counter()
    while len(begun) < users:
        if not engine.has_work:
            raise RuntimeError(f"the engine has nothing to do, though {len(begun)} of {users} have begun")
        begun |= {event.request_id for event in checked_step(engine)}
    prefill_seconds = time.perf_counter() - start
    for _ in range(WARM_UP_STEPS):
        checked_step(engine)
    synchronize(bench.device)
    walls, tokens = [], 0
    begin = time.perf_counter()
    for _ in range(steps):
        start = time.perf_counter()
        tokens += sum(len(event.new_token_ids) for event in checked_step(engine))
        walls.append(time.perf_counter() - start)
    elapsed = time.perf_counter() - begin
    row: Row = {
        "users": users,
        "context": context,
        "tokens_per_s": tokens / elapsed,
        "step_ms": elapsed / steps * 1e3,
        "longest_step_ms": max(walls) * 1e3,
        "prefill_seconds": prefill_seconds,
    }
    if bench.device.type == "cuda" and (users, context) in bench.setting.sizes.profiled:
        try:
            profile = profile_steps(lambda: checked_step(engine), PROFILED_STEPS, time.perf_counter)
            row |= {
                "idle_share": max(0.0, 1.0 - profile.busy / (elapsed / steps)),
                "device_busy_ms": profile.busy * 1e3,
                "device_working_ms": profile.working * 1e3,
                "host_ms_profiled": profile.host * 1e3,
            }
        except (RuntimeError, AttributeError) as error:
            row["profile"] = f"failed: {error}"
    row["preemptions"] = engine.stats().num_preemptions - preemptions
    bench.drain(engine, request_ids)
    return row
