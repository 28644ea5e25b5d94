"""After calibration on one workload, simulated and measured runs of others agree, on whatever machine it is.

Both runs go through the same loop. The measured engine computes with one thread, and its clock is that
thread's CPU time: what others do on the machine meanwhile takes none of it, other than by sharing caches and
clock rate. On an idle machine it is the same as the wall clock's.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import pytest
import torch

from minivllm import LLM
from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.steps import StepRecord
from minivllm_bench.metrics import summarise
from minivllm_bench.simulator.calibrate import Sample, calibrate, samples_of
from minivllm_bench.simulator.clock import VirtualClock
from minivllm_bench.simulator.deployment import Deployment
from minivllm_bench.simulator.models import find_model
from minivllm_bench.simulator.simulation import Simulation
from minivllm_bench.workloads import Session, Workload, fixed, memoryless, sharegpt_like

TOLERANCE = 0.15
ATTEMPTS = 3
"""Another program that begins or ends meanwhile changes the clock rate, and with it the machine."""
ROUNDS = 2
CONFIG = EngineConfig(seed=0, max_model_len=1024)

# (users, sessions, what they ask for)
CALIBRATION: list[tuple[int, int, Workload]] = [
    (1, 2, fixed(24, 16)),
    (3, 6, sharegpt_like(mean_prompt=50, mean_output=16, longest=160)),
    (12, 14, sharegpt_like(mean_prompt=30, mean_output=12, longest=120)),
    (1, 1, fixed(300, 3)),
]
VALIDATION: dict[str, tuple[int, int, Workload]] = {
    "one user": (1, 3, memoryless(40, 12, 40)),
    "long prompts": (2, 4, fixed(150, 10)),
    "many users": (7, 14, memoryless(40, 16, 60)),
}


class ThreadTime(VirtualClock):
    """This thread's CPU time. Nobody can advance it, nor has to: users wait for nothing but answers."""

    def __init__(self) -> None:
        pass

    @property
    def now(self) -> float:  # type: ignore[override]
        return time.thread_time()

    def advance_to(self, moment: float) -> None:
        raise AssertionError("a closed loop is never idle")


class Measured:
    """The embedded model, computing with one thread."""

    def __init__(self) -> None:
        self.llm = LLM(**{**vars(CONFIG), "cpu_threads": 1})
        self.steps: list[StepRecord] = []
        self.run(2, 2, fixed(10, 4), seed=-1)  # warm-up
        self.steps.clear()

    def run(self, users: int, num_sessions: int, workload: Workload, seed: int) -> Simulation:
        clock, like = ThreadTime(), self.llm.engine
        engine = Engine(
            CONFIG,
            like.runner,
            like.info,
            num_blocks=like.block_manager.num_blocks,
            max_num_batched_tokens=like.scheduler.limits.max_num_batched_tokens,
            eos_token_ids=frozenset(),
            clock=clock,
            sinks=[self.steps.append],
        )
        simulation = Simulation(engine, clock, users=users, sessions=sessions(workload, num_sessions, seed))
        simulation.run()
        return simulation


def sessions(workload: Workload, count: int, seed: int) -> Iterator[Session]:
    return itertools.islice(workload(random.Random(seed)), count)


def figures(run: Simulation) -> tuple[float, float, float]:
    """Tokens, seconds, and the sum of all times to first token."""
    summary = summarise(run.records, run.seconds)
    assert summary["completed"] == summary["requests"]
    return summary["output_tokens"], run.seconds, summary["ttft"]["mean"] * summary["requests"]


def differences(measured: Measured, seed: int) -> dict[str, tuple[float, float]]:
    """Of throughput and mean TTFT, by workload: simulated over measured, less 1."""
    samples: list[Sample] = []
    totals = {name: [0.0, 0.0, 0.0] for name in VALIDATION}
    # In turns: a machine that becomes slower does so for both.
    for number in range(ROUNDS):
        for place, (users, count, workload) in enumerate(CALIBRATION):
            measured.steps.clear()
            measured.run(users, count, workload, seed=100 * seed + 10 * number + place)
            samples += samples_of(measured.steps)
            for name, (users, count, workload) in itertools.islice(VALIDATION.items(), place, place + 1):
                run = measured.run(users, count, workload, seed=1000 + number)
                totals[name] = [a + b for a, b in zip(totals[name], figures(run), strict=True)]

    model = find_model(None)
    rates = calibrate(samples, model, kv_itemsize=2).rates
    deployment = Deployment(model=model, device=None, rates=rates, config=CONFIG)
    found = {}
    for name, (users, count, workload) in VALIDATION.items():
        simulated = [0.0, 0.0, 0.0]
        for number in range(ROUNDS):
            engine, clock = deployment.engine()
            run = Simulation(engine, clock, users=users, sessions=sessions(workload, count, 1000 + number))
            run.run()
            simulated = [a + b for a, b in zip(simulated, figures(run), strict=True)]
        tokens, seconds, ttft = totals[name]
        assert simulated[0] == tokens, "both serve the same requests"
        found[name] = seconds / simulated[1] - 1, simulated[2] / ttft - 1
    return found


@pytest.fixture
def measured() -> Iterator[Measured]:
    num_threads = torch.get_num_threads()
    try:
        yield Measured()
    finally:
        torch.set_num_threads(num_threads)


def test_simulated_and_measured_runs_agree(measured: Measured) -> None:
    for attempt in range(ATTEMPTS):
        found = differences(measured, seed=attempt)
        print(found)
        if all(abs(difference) <= TOLERANCE for pair in found.values() for difference in pair):
            return
    pytest.fail(f"simulated / measured - 1, of throughput and mean TTFT: {found}")
