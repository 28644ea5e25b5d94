"""What a decode step costs in Python, with no model: scheduling, batch building, update.

    python benchmarks/scheduler.py [--sequences 1,16,64,256,512,1024] [--context 1000] [--trace] [--profile]

That many sequences run in steady decode over a paged pool with its prefix cache, their lengths spread
so that one in sixteen needs a new block at each step. Tokens are made up; nothing else is fake:

    schedule   Scheduler.schedule: who runs, new blocks, full ones hashed
    build      FlatBatch.build: the step's tensors, on the CPU
    update     Scheduler.advance and update: tokens put in their places, events made
    trace      what --trace FILE adds to that: the step's record, made and written (0 without --trace)

Times are the thread's own CPU time: what others do on the machine in between isn't counted. Of --rounds
the fastest counts: the work is the same in all of them, the processor's clock is not.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import itertools
import json
import pstats
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks" / "src")]

import torch  # noqa: E402

from minivllm.config import BLOCK_SIZE, EngineConfig  # noqa: E402
from minivllm.engine.batch import FlatBatch  # noqa: E402
from minivllm.engine.block_manager import PagedBlockManager, blocks_for  # noqa: E402
from minivllm.engine.scheduler import ContinuousScheduler, SampledToken, SchedulerLimits  # noqa: E402
from minivllm.engine.steps import StepRecorder  # noqa: E402
from minivllm.request import EngineStats, Request, SamplingParams  # noqa: E402
from minivllm.tracing.writer import TraceWriter  # noqa: E402
from minivllm_bench import machine  # noqa: E402

CPU = torch.device("cpu")
VOCABULARY = 128_000
WARM_UP_STEPS = 2 * BLOCK_SIZE
TARGET_SEQUENCES, TARGET_MS = 256, 1.0
PARTS = ("schedule", "build", "update", "trace")


@dataclass
class Times:
    """CPU seconds of each part, by step."""

    schedule: list[float] = field(default_factory=list)
    build: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, dict[str, float]]:
        """Milliseconds of a step: mean, median and longest, of each part and of all."""
        by_part = {name: getattr(self, name) for name in PARTS}
        by_part["all"] = [sum(step) for step in zip(*by_part.values(), strict=True)]
        return {
            name: {
                "mean_ms": statistics.fmean(seconds) * 1e3,
                "median_ms": statistics.median(seconds) * 1e3,
                "longest_ms": max(seconds) * 1e3,
            }
            for name, seconds in by_part.items()
        }


class SteadyDecode:
    """So many sequences that have all been prefilled, and that never end."""

    def __init__(self, num_sequences: int, context: int, num_steps: int, trace: TraceWriter | None) -> None:
        length = context + 2 * BLOCK_SIZE + WARM_UP_STEPS + num_steps
        blocks = num_sequences * (blocks_for(length) + 2)
        limits = SchedulerLimits(
            max_num_seqs=num_sequences, max_num_batched_tokens=num_sequences * (context + BLOCK_SIZE)
        )
        self.scheduler = ContinuousScheduler(PagedBlockManager(blocks, use_prefix_cache=True), limits)
        rng = random.Random(0)
        sampling = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
        for index in range(num_sequences):
            prompt = rng.choices(range(VOCABULARY), k=context + index % BLOCK_SIZE)
            id = f"chatcmpl-{rng.randbytes(16).hex()}-0"
            self.scheduler.add(Request(id, prompt, sampling, seed=0, max_total_tokens=2 * length))
        self.recorder = None if trace is None else StepRecorder((trace,), time.monotonic)
        if self.recorder is not None:
            for request in self.scheduler.waiting:
                self.recorder.arrived(request)
        self.tokens = itertools.cycle(rng.choices(range(VOCABULARY), k=9973))
        self.step(Times())
        if len(self.scheduler.running) != num_sequences:
            raise RuntimeError(f"{len(self.scheduler.running)} of {num_sequences} sequences run")

    def step(self, times: Times) -> None:
        """One step; its times are appended."""
        moments = [time.thread_time()]
        batch = self.scheduler.schedule()
        moments.append(time.thread_time())
        record = None
        if self.recorder is not None:
            counts = EngineStats(len(self.scheduler.running), 0, 0, 1, 0, 0, 0)
            record = self.recorder.open(time.monotonic(), batch, counts)
        moments.append(time.thread_time())
        FlatBatch.build(batch, CPU)
        moments.append(time.thread_time())
        sampled: list[SampledToken | None] = [
            SampledToken(token) for token in itertools.islice(self.tokens, len(batch.requests))
        ]
        start = time.thread_time()
        self.scheduler.advance(batch)
        events = self.scheduler.update(batch, sampled)
        times.update.append(time.thread_time() - start)
        times.schedule.append(moments[1] - moments[0])
        times.build.append(moments[3] - moments[2])
        start = time.thread_time()
        if self.recorder is not None and record is not None:
            record.launched_time = record.wait_time = record.tokens_time = time.monotonic()
            self.recorder.close(record, events)
        times.trace.append(time.thread_time() - start + moments[2] - moments[1])


def measure(
    num_sequences: int, context: int, num_steps: int, trace: TraceWriter | None
) -> dict[str, dict[str, float]]:
    """Figures of steady decode."""
    bench = SteadyDecode(num_sequences, context, num_steps, trace)
    for _ in range(WARM_UP_STEPS):
        bench.step(Times())
    gc.collect()
    gc.freeze()  # as the engine process does when it is up
    times = Times()
    for _ in range(num_steps):
        bench.step(times)
    bench.scheduler.check_integrity()
    return times.figures()


def profile(num_sequences: int, context: int, num_steps: int) -> None:
    """Print the functions that most time is spent in; the profiler makes small ones look larger."""
    bench = SteadyDecode(num_sequences, context, num_steps, None)
    for _ in range(WARM_UP_STEPS):
        bench.step(Times())
    with cProfile.Profile() as profiler:
        for _ in range(num_steps):
            bench.step(Times())
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description="Python's part of a decode step, without a model.")
    parser.add_argument(
        "--sequences",
        type=lambda text: [int(number) for number in text.split(",")],
        default=[1, 16, 64, 256, 512, 1024],
        help="that decode at once (default: 1,16,64,256,512,1024)",
    )
    parser.add_argument("--context", type=int, default=1000, help="tokens of each (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts (default: 5)")
    parser.add_argument("--steps", type=int, default=160, help="that are measured (default: 160)")
    parser.add_argument("--trace", action="store_true", help="trace the steps to a temporary file")
    parser.add_argument("--profile", action="store_true", help="show where the last one's time goes")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the figures to this JSON file, too"
    )
    args = parser.parse_args()
    if min(*args.sequences, args.context, args.steps, args.rounds) < 1:
        parser.error("--sequences, --context, --steps and --rounds must be at least 1")
    busy = machine.warn_if_busy()
    torch.set_num_threads(1)

    results: dict[str, Any] = {}
    heads = " ".join(f"{name:>9}" for name in (*PARTS, "all"))
    print(f"{'ms per step, median':>20} {heads}  µs/sequence")
    for num_sequences in args.sequences:
        rounds = []
        for _ in range(args.rounds):
            with contextlib.ExitStack() as stack:
                trace = None
                if args.trace:
                    file = stack.enter_context(tempfile.NamedTemporaryFile())
                    trace = TraceWriter(file.name)
                    trace.begin(EngineConfig(), {}, origin=time.monotonic(), runs_ahead=False)
                rounds.append(measure(num_sequences, args.context, args.steps, trace))
                if trace is not None:
                    num_bytes = Path(file.name).stat().st_size / (args.steps + WARM_UP_STEPS)
        figures = min(rounds, key=lambda figures: figures["all"]["median_ms"])
        results[str(num_sequences)] = figures
        cells = " ".join(f"{figures[name]['median_ms']:9.3f}" for name in (*PARTS, "all"))
        each = figures["all"]["median_ms"] / num_sequences * 1e3
        written = f", {num_bytes:.0f} bytes of trace a step" if args.trace else ""
        print(f"{num_sequences:>10} sequences {cells}  {each:11.2f}{written}", flush=True)
    if str(TARGET_SEQUENCES) in results:
        median = results[str(TARGET_SEQUENCES)]["all"]["median_ms"]
        verdict = "reached" if median < TARGET_MS else "not reached"
        print(f"wanted at {TARGET_SEQUENCES} sequences: less than {TARGET_MS} ms; {median:.3f} ms: {verdict}")
    if args.output is not None:
        report = {
            "machine": machine.describe(),
            "busy processes": busy,
            "commit": machine.revision(ROOT),
            "context": args.context,
            "steps": args.steps,
            "rounds": args.rounds,
            "results": results,
        }
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if args.profile:
        profile(args.sequences[-1], args.context, args.steps)


if __name__ == "__main__":
    main()
