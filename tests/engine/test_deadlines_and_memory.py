"""Requests that run out of time, and steps that don't fit into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minivllm_kernels import KVPool

from minivllm.config import EngineConfig
from minivllm.engine.batch import FlatBatch
from minivllm.engine.engine import Engine
from minivllm.engine.runner import TorchRunner
from minivllm.engine.scheduler import SampledToken, ScheduledBatch
from minivllm.request import EngineEvent, EngineInfo, FinishReason, Request, SamplingParams, Terms
from tests.conftest import run_all

from .conftest import MakeEngine


class CountingRunner:
    """A sequence's next token is its length: independent of batches. Large steps don't fit."""

    runs_ahead = False

    def __init__(self, max_tokens: int = 10**9) -> None:
        self.max_tokens = max_tokens
        self.largest = 0

    def execute(self, batch: ScheduledBatch) -> Callable[[], list[SampledToken | None]]:
        if batch.num_tokens > self.max_tokens:
            raise MemoryError("the card is full")
        self.largest = max(self.largest, batch.num_tokens)
        tokens = [
            SampledToken(item.start + item.num_tokens) if item.is_sampled else None for item in batch.requests
        ]
        return lambda: tokens


class Clock:
    def __init__(self) -> None:
        self.now = 1.0

    def __call__(self) -> float:
        return self.now


def make_engine(runner: CountingRunner, clock: Clock, *, num_blocks: int = 64, **settings: object) -> Engine:
    return Engine(
        EngineConfig(**settings),
        runner,
        EngineInfo(max_model_len=512, vocab_size=1000),
        num_blocks=num_blocks,
        max_num_batched_tokens=128,
        eos_token_ids=frozenset(),
        clock=clock,
    )


def finish(engine: Engine, clock: Clock | None = None) -> dict[str, list[EngineEvent]]:
    events: dict[str, list[EngineEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
        if clock is not None:
            clock.now += 1.0
    return events


def tokens(events: list[EngineEvent]) -> list[int]:
    return [token for event in events for token in event.new_token_ids]


def test_a_request_out_of_time_ends_and_frees_its_blocks() -> None:
    clock = Clock()
    engine = make_engine(CountingRunner(), clock)
    engine.add("late", [1] * 20, SamplingParams(max_tokens=100), Terms(timeout=4.5))
    engine.add("patient", [1] * 20, SamplingParams(max_tokens=30))
    events = finish(engine, clock)
    assert events["late"][-1].finish_reason is FinishReason.TIMEOUT
    assert tokens(events["late"]) == [20, 21, 22, 23, 24]  # steps at 0, 1, 2, 3 and 4 s
    assert events["patient"][-1].finish_reason is FinishReason.LENGTH
    assert engine.stats().num_used_blocks == 0


def test_one_that_waits_is_dropped_and_nobody_is_evicted_for_it() -> None:
    clock = Clock()
    engine = make_engine(CountingRunner(), clock, scheduler="sequential")
    engine.add("long", [1] * 20, SamplingParams(max_tokens=50))
    engine.step()
    engine.add("late", [1] * 20, SamplingParams(max_tokens=5), Terms(timeout=3.0, priority=-1))
    engine.add("last", [1] * 20, SamplingParams(max_tokens=5), Terms(timeout=200.0))
    events = finish(engine, clock)
    assert [event.finish_reason for event in events["late"]] == [FinishReason.TIMEOUT]
    assert len(tokens(events["last"])) == 5
    assert engine.stats().num_preemptions == 0


def test_an_id_may_be_used_again_after_a_deadline_that_was_met() -> None:
    clock = Clock()
    engine = make_engine(CountingRunner(), clock)
    engine.add("a", [1] * 20, SamplingParams(max_tokens=2), Terms(timeout=5.0))
    finish(engine, clock)
    engine.add("a", [1] * 20, SamplingParams(max_tokens=20))
    assert finish(engine, clock)["a"][-1].finish_reason is FinishReason.LENGTH


def test_nothing_is_left_of_a_request_that_met_its_deadline() -> None:
    engine = make_engine(CountingRunner(), Clock())
    for name in ("met its deadline", "aborted"):
        engine.add(name, [1] * 20, SamplingParams(max_tokens=2), Terms(timeout=86400.0))
    engine.abort("aborted")
    finish(engine)
    gc.collect()
    assert not [item for item in gc.get_objects() if isinstance(item, Request)]


def test_deadlines_of_any_order() -> None:
    clock = Clock()
    engine = make_engine(CountingRunner(), clock)
    for timeout in (7.5, 2.5, 5.5, 3.5, 100.0):
        engine.add(str(timeout), [1], SamplingParams(max_tokens=20), Terms(timeout=timeout))
    events = finish(engine, clock)
    counts = {name: len(tokens(own)) for name, own in events.items()}
    assert counts == {"7.5": 8, "2.5": 3, "5.5": 6, "3.5": 4, "100.0": 20}


@pytest.mark.parametrize("kv_allocation", ["paged", "contiguous"])
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    max_tokens=st.integers(1, 128),
    num_blocks=st.integers(33, 80),
)
@settings(max_examples=60)
def test_steps_that_do_not_fit_become_smaller_and_nobody_fails(
    kv_allocation: str, lengths: list[int], max_tokens: int, num_blocks: int
) -> None:
    runner = CountingRunner(max_tokens)
    engine = make_engine(runner, Clock(), num_blocks=num_blocks, kv_allocation=kv_allocation)
    for number, length in enumerate(lengths):
        engine.add(str(number), [7] * length, SamplingParams(max_tokens=10))  # they share their prefixes
    events = finish(engine)
    for number, length in enumerate(lengths):
        assert tokens(events[str(number)]) == list(range(length, length + 10))
        assert events[str(number)][-1].finish_reason is FinishReason.LENGTH
    assert runner.largest <= max_tokens


def test_steps_grow_again_when_there_is_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.engine.engine.STEPS_BEFORE_GROWTH", 10)
    runner = CountingRunner(max_tokens=3)
    engine = make_engine(runner, Clock(), enable_prefix_caching=False)
    sizes = []

    def ask() -> None:
        engine.add("a", [7] * 128, SamplingParams(max_tokens=20))
        assert tokens(finish(engine)["a"]) == list(range(128, 148))
        sizes.append(engine.scheduler.max_num_batched_tokens)

    ask()
    ask()  # what has grown too much shrinks again
    assert sizes[-1] < 128
    assert runner.largest == 2
    runner.max_tokens = 10**9
    while sizes[-1] < 128:
        assert len(sizes) < 1000
        ask()
    ask()
    assert sizes[2:] == sorted(sizes[2:])
    assert runner.largest == 128


def test_a_step_of_one_token_that_does_not_fit_fails_its_request_alone() -> None:
    engine = make_engine(CountingRunner(max_tokens=0), Clock())
    engine.add("a", [1], SamplingParams(max_tokens=10))
    engine.add("b", [1], SamplingParams(max_tokens=10))
    events = finish(engine)
    for name in "ab":
        assert events[name][-1].finish_reason is FinishReason.ERROR
        assert "the card is full" in (events[name][-1].error or "")


def test_a_full_gpu_makes_steps_smaller(
    make_tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch raises then is what the engine understands."""
    prompt, sampling = list(range(5, 45)), SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    expected = run_all(make_tiny_engine(), [prompt], sampling)
    engine = make_tiny_engine()
    assert isinstance(engine.runner, TorchRunner)
    hidden, sizes = engine.runner.model.hidden, []

    def raise_once(flat: FlatBatch, pool: KVPool) -> torch.Tensor:
        sizes.append(len(flat.input_ids_T))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("the card is full.")
        return hidden(flat, pool)

    monkeypatch.setattr(engine.runner.model, "hidden", raise_once)
    assert run_all(engine, [prompt], sampling) == expected
    assert sizes == [40, 20, 20, 1, 1, 1, 1]
