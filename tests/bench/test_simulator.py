"""The simulated runner and its loop: the engine's own scheduler, a clock of its own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.scheduler import ScheduledBatch
from minivllm.request import EngineInfo
from minivllm_bench.load import arrival_times
from minivllm_bench.records import RequestRecord
from minivllm_bench.simulator.clock import VirtualClock
from minivllm_bench.simulator.runner import SimulatedRunner, StepCost
from minivllm_bench.simulator.simulation import Simulation
from minivllm_bench.workloads import WORKLOADS, Session, Turn, fixed

HOST, DEVICE = 0.002, 0.010


def make_engine(
    *, host: float = 0.0, runs_ahead: bool = False, num_blocks: int = 1000, **options: object
) -> tuple[Engine, VirtualClock, list[int]]:
    """An engine whose steps take HOST and DEVICE seconds; and the number of sequences of each step."""
    clock = VirtualClock()
    steps: list[int] = []

    def cost(batch: ScheduledBatch) -> StepCost:
        steps.append(len(batch.requests))
        return StepCost(host, DEVICE)

    engine = Engine(
        EngineConfig(**options),  # type: ignore[arg-type]
        SimulatedRunner(cost, clock, runs_ahead=runs_ahead),
        EngineInfo(max_model_len=2048, vocab_size=1000),
        num_blocks=num_blocks,
        max_num_batched_tokens=512,
        eos_token_ids=frozenset(),
        clock=clock,
    )
    return engine, clock, steps


def one_session(*turns: tuple[int, int], at: float = 0.0) -> tuple[float, Session]:
    return at, Session(tuple(Turn(*turn) for turn in turns))


def poisson(workload: str, rate: float, seed: int) -> Iterator[tuple[float, Session]]:
    rng = random.Random(seed)
    return zip(arrival_times(rate, 1.0, rng), WORKLOADS[workload](rng), strict=False)


@pytest.mark.parametrize(("runs_ahead", "seconds"), [(False, 8 * (HOST + DEVICE)), (True, HOST + 8 * DEVICE)])
def test_host_and_device_overlap_where_the_runner_runs_ahead(runs_ahead: bool, seconds: float) -> None:
    engine, clock, _ = make_engine(host=HOST, runs_ahead=runs_ahead)
    simulation = Simulation(engine, clock, arrivals=[one_session((20, 8))])
    (record,) = simulation.run()
    assert record.finished == pytest.approx(seconds)
    assert record.ttft == pytest.approx(HOST + DEVICE)
    assert len(record.chunk_times) == record.output_tokens == 8


def test_a_slow_host_sets_the_pace_even_when_it_runs_ahead() -> None:
    engine, clock, _ = make_engine(host=3 * DEVICE, runs_ahead=True)
    (record,) = Simulation(engine, clock, arrivals=[one_session((20, 8))]).run()
    assert record.finished == pytest.approx(8 * 3 * DEVICE + DEVICE)


def test_open_loop_sessions_begin_when_they_will_and_time_without_work_passes() -> None:
    engine, clock, steps = make_engine()
    arrivals = [one_session((20, 5), at=moment) for moment in (0.5, 0.505, 2.0)]
    records = Simulation(engine, clock, arrivals=arrivals).run()
    assert [record.sent for record in records] == pytest.approx([0.5, 0.505, 2.0])
    assert [record.ttft for record in records] == pytest.approx([0.010, 0.015, 0.010])
    assert steps == [1, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]


def test_a_closed_loop_keeps_its_users_busy() -> None:
    engine, clock, steps = make_engine()
    sessions = fixed(10, 4)(random.Random(0))
    records = Simulation(engine, clock, users=3, sessions=sessions).run(1.0)
    assert set(steps) == {3}
    assert clock.now - VirtualClock.START == pytest.approx(1.0)
    assert len(records) == pytest.approx(3 * 25, abs=3)


def test_later_turns_find_earlier_ones_in_the_prefix_cache() -> None:
    engine, clock, _ = make_engine()
    records = Simulation(engine, clock, arrivals=[one_session((100, 28), (10, 5))]).run()
    assert [record.prompt_tokens for record in records] == [100, 138]
    assert [record.cached_tokens for record in records] == [0, 127 // 16 * 16]
    assert records[1].sent == records[0].finished


@pytest.mark.parametrize("scheduler", ["continuous", "sequential"])
@pytest.mark.parametrize("kv_allocation", ["paged", "contiguous"])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_every_token_is_made_whatever_the_mode(kv_allocation: str, scheduler: str, runs_ahead: bool) -> None:
    engine, clock, _ = make_engine(
        runs_ahead=runs_ahead, num_blocks=300, kv_allocation=kv_allocation, scheduler=scheduler
    )
    arrivals = list(itertools.islice(poisson("sharegpt", 50.0, seed=7), 60))
    records = Simulation(engine, clock, arrivals=arrivals).run()
    wanted = [session.turns[0] for _, session in arrivals]
    assert [record.output_tokens for record in records] == [turn.output_tokens for turn in wanted]
    assert all(record.is_complete for record in records)
    assert all(record.chunk_times == sorted(record.chunk_times) for record in records)
    engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    if kv_allocation == "paged" and scheduler == "continuous":
        assert engine.stats().num_preemptions > 0, "the pool is meant to be too small"


def test_a_request_that_can_never_fit_fails_and_the_session_goes_on() -> None:
    engine, clock, _ = make_engine(num_blocks=4)
    records = Simulation(
        engine, clock, users=1, sessions=iter([Session((Turn(100, 5),)), Session((Turn(5, 5),))])
    ).run()
    assert [record.error is None for record in records] == [False, True]


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> list[RequestRecord]:
        engine, clock, _ = make_engine()
        return Simulation(engine, clock, arrivals=poisson("chat", 3.0, seed)).run(20.0)

    assert run(1) == run(1)
    assert run(1) != run(2)
