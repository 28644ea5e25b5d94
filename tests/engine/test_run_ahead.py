"""A runner that runs ahead and replays decode graphs, as on a GPU, gives the tokens of one that doesn't.

Here it is the CPU's, which has nothing to overlap or to record, but takes the same way: the next step is
scheduled and started while the tokens of the last one are pending, and a replay computes again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from minivllm_kernels import KVPool

from minivllm.config import EngineConfig
from minivllm.engine.batch import FlatBatch
from minivllm.engine.decode_graphs import DecodeGraphs, graph_sizes
from minivllm.engine.engine import Engine
from minivllm.engine.profiling import compile_kernels, longest_batch
from minivllm.engine.runner import PendingTokens, TorchRunner, empty_pool
from minivllm.engine.scheduler import SampledToken, ScheduledBatch
from minivllm.request import PENDING_TOKEN, EngineEvent, EngineInfo, FinishReason, SamplingParams
from tests.conftest import run_all
from tests.tiny_model import VOCAB_SIZE

MakeEngine = Callable[..., Engine]
BLOCK_BYTES = 2 * 2 * 2 * 8 * 16 * 4  # keys and values of 16 tokens in the tiny model, float32


def with_graphs(engine: Engine, sizes: list[int]) -> Engine:
    """Decodes go through the inputs of graphs, of which more are padding's than not."""
    runner = engine.runner
    assert isinstance(runner, TorchRunner)
    runner.graphs = DecodeGraphs(
        runner.model,
        runner.pool,
        padding_block=runner.padding_block,
        max_model_len=200,
        sizes=sizes,
        record=lambda compute: compute,
    )
    return engine


SAMPLINGS = [
    SamplingParams(max_tokens=30, temperature=0.0),
    SamplingParams(max_tokens=1, temperature=0.0, logprobs=2),
    SamplingParams(max_tokens=40, temperature=1.0, seed=3, min_tokens=20, stop_token_ids=tuple(range(50))),
    SamplingParams(max_tokens=25, temperature=0.8, seed=4, top_k=20, logprobs=0),
    SamplingParams(max_tokens=35, temperature=0.0, repetition_penalty=1.5, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=1.0, seed=5, frequency_penalty=2.0, presence_penalty=1.0),
]


def with_tokens(events: list[EngineEvent]) -> list[EngineEvent]:
    """Without those that tell that a long prompt was begun: chunks end elsewhere in each run."""
    return [event for event in events if event.new_token_ids]


def run(engine: Engine, seed: int, num_requests: int) -> dict[str, list[EngineEvent]]:
    """Requests of every kind, some of which come while others run."""
    rng = random.Random(seed)
    events: dict[str, list[EngineEvent]] = {}
    waiting = list(range(num_requests))
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), rng.randrange(8))):
            number = waiting.pop(0)
            # Half of the prompts begin alike, for the prefix cache.
            shared = [7] * rng.choice([0, 40])
            prompt = shared + [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 15, 16, 17, 30, 60]))]
            events[str(number)] = []
            engine.add(str(number), prompt, SAMPLINGS[number % len(SAMPLINGS)])
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    return events


def tokens_of(events: list[EngineEvent]) -> list[int]:
    return [token for event in events for token in event.new_token_ids]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 32},
        {"num_blocks": 14},
        {"num_blocks": 52, "kv_allocation": "contiguous"},
        {"enable_prefix_caching": False, "scheduler": "sequential", "num_parallel": 2},
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())) or "default",
)
@pytest.mark.parametrize("has_graphs", [False, True])
def test_the_tokens_are_the_same(
    make_tiny_engine: MakeEngine, settings: dict[str, Any], has_graphs: bool
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    want = run(make_tiny_engine(runs_ahead=False, **settings), seed, 24)
    engine = make_tiny_engine(runs_ahead=True, **settings)
    if has_graphs:
        engine = with_graphs(engine, [1, 4, 9])
    have = run(engine, seed, 24)
    for number, events in want.items():
        assert tokens_of(have[number]) == tokens_of(events)
        assert PENDING_TOKEN not in tokens_of(events)
        assert have[number][-1].finish_reason == events[-1].finish_reason
        for ours, theirs in zip(with_tokens(have[number]), with_tokens(events), strict=True):
            assert (ours.logprobs is None) == (theirs.logprobs is None)
            if ours.logprobs is not None and theirs.logprobs is not None:
                assert ours.logprobs[0].token_id == theirs.logprobs[0].token_id
                assert ours.logprobs[0].logprob == pytest.approx(theirs.logprobs[0].logprob, abs=1e-4)


def test_a_sequence_is_evicted_while_its_token_is_pending(make_tiny_engine: MakeEngine) -> None:
    """Six sequences that begin with 2 blocks and end with 5, in a pool of 14."""
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(30)] for _ in range(6)]
    sampling = SamplingParams(max_tokens=40, temperature=1.0, seed=8, ignore_eos=True)
    engines = [make_tiny_engine(runs_ahead=runs_ahead, num_blocks=14) for runs_ahead in (False, True)]
    want, have = (run_all(engine, prompts, sampling) for engine in engines)
    assert have == want
    assert all(engine.stats().num_preemptions > 0 for engine in engines)


def test_a_step_is_left_running(make_tiny_engine: MakeEngine) -> None:
    """The first step brings nothing: its token is taken in when the second has been started."""
    engine = make_tiny_engine(runs_ahead=True)
    engine.add("a", [5, 6, 7], SamplingParams(max_tokens=2, temperature=0.0))
    assert engine.step() == []
    (first,) = engine.step()
    (second,) = engine.step()
    assert (first.finish_reason, second.finish_reason) == (None, FinishReason.LENGTH)
    assert not engine.has_work  # both tokens are known to be the last: no step was run for nothing


def test_penalties_wait_for_the_token_before(make_tiny_engine: MakeEngine) -> None:
    """Nothing is scheduled ahead of a token that the next choice depends on."""
    engine = make_tiny_engine(runs_ahead=True)
    engine.add("a", [5, 6, 7], SamplingParams(max_tokens=3, temperature=0.0, repetition_penalty=1.3))
    engine.step()
    (request,) = engine.scheduler.running
    assert request.token_ids[-1] == PENDING_TOKEN
    engine.step()
    assert request.token_ids.count(PENDING_TOKEN) == 1


def test_abort_while_its_step_runs(make_tiny_engine: MakeEngine) -> None:
    engine = make_tiny_engine(runs_ahead=True)
    for name in "ab":
        engine.add(name, [5, 6, 7], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    engine.step()
    assert engine.abort("a") is not None
    engine.check_integrity()
    engine.add("a", [8, 9], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    events: dict[str, int] = {"a": 0, "b": 0}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id] += len(event.new_token_ids)
        engine.check_integrity()
    assert events == {"a": 2, "b": 4}


class LosingRunner:
    """Whose first step fails when its tokens are asked for."""

    runs_ahead = True
    num_steps = 0

    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        self.num_steps += 1
        if self.num_steps == 1:
            return self.fail
        tokens = [SampledToken(5) if item.is_sampled else None for item in batch.requests]
        return lambda: tokens

    def fail(self) -> list[SampledToken | None]:
        raise RuntimeError("the device is gone")


@pytest.mark.parametrize("is_aborted", [True, False])
def test_what_a_lost_step_did_not_write_is_shared_with_nobody(is_aborted: bool) -> None:
    """Not even where its request ended, and gave its blocks back, before anybody knew."""
    engine = Engine(
        EngineConfig(),
        LosingRunner(),
        EngineInfo(max_model_len=512, vocab_size=100),
        num_blocks=20,
        max_num_batched_tokens=128,
        eos_token_ids=frozenset(),
    )
    prompt, params = [1] * 40, SamplingParams(max_tokens=2)
    engine.add("lost", prompt, params)
    engine.step()
    if is_aborted:
        engine.abort("lost")
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    for num_hits in (0, 32):
        engine.add("again", prompt, params)
        while engine.has_work:
            engine.step()
            engine.check_integrity()
        assert engine.block_manager.num_hit_tokens == num_hits


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 50, 256, 1000])
def test_graph_sizes_reach_the_limit(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    # Little is computed for nothing.
    assert all(after - before <= max(before, 8) for before, after in pairwise([0, *sizes]))


def test_which_batches_have_a_graph(make_tiny_engine: MakeEngine) -> None:
    """Decodes alone, up to the largest size; a prompt's one-token chunk gets no logits."""
    engine = with_graphs(make_tiny_engine(runs_ahead=False, max_num_batched_tokens=3), [2])
    runner = engine.runner
    assert isinstance(runner, TorchRunner)
    assert runner.graphs is not None
    can_run: list[tuple[int, bool]] = []
    execute = runner.execute

    def spy(batch: ScheduledBatch) -> PendingTokens:
        assert runner.graphs is not None
        can_run.append((batch.num_tokens, runner.graphs.can_run(batch)))
        return execute(batch)

    runner.execute = spy  # type: ignore[method-assign]
    engine.add("a", [5, 6], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    engine.add("b", [5, 6, 7], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    engine.step()  # a's prompt, and one token of b's
    engine.step()  # a decode, and the rest of b's prompt
    engine.step()
    engine.add("c", [5], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    engine.step()
    assert can_run == [(3, False), (3, False), (2, True), (3, False)]


@pytest.mark.parametrize(("num_tokens", "num_seqs"), [(1, 1), (40, 1), (40, 7), (7, 7)])
def test_the_longest_step_is_one_that_the_model_takes(
    make_tiny_engine: MakeEngine, num_tokens: int, num_seqs: int
) -> None:
    """What is run to measure memory: so many tokens, so many rows of logits, in a pool of one block."""
    runner = make_tiny_engine(runs_ahead=False).runner
    assert isinstance(runner, TorchRunner)
    flat = longest_batch(num_tokens, num_seqs, torch.device("cpu"))
    assert flat.seq_lens_B.tolist() == [num_tokens - num_seqs + 1, *[1] * (num_seqs - 1)]
    assert flat.query_start_B1.diff().tolist() == flat.seq_lens_B.tolist()
    pool = empty_pool(runner.model, num_blocks=1, kv_dtype=torch.float32)
    with torch.inference_mode():
        assert runner.model(flat, pool).shape == (num_seqs, VOCAB_SIZE)


@pytest.mark.parametrize("num_tokens", [1, 20, 64])
def test_kernels_are_compiled_by_running_them(make_tiny_engine: MakeEngine, num_tokens: int) -> None:
    """Prompts and late chunks of every length, on kernels that note what they are called with."""
    runner = make_tiny_engine(runs_ahead=False).runner
    assert isinstance(runner, TorchRunner)
    seen: set[tuple[int, int]] = set()
    hidden = runner.model.hidden

    def spy(flat: FlatBatch, pool: KVPool) -> torch.Tensor:
        seen.add((len(flat.input_ids_T), int(flat.seq_lens_B[0])))
        assert flat.block_tables_BM.shape[1] * 16 >= int(flat.seq_lens_B[0])
        return hidden(flat, pool)

    runner.model.hidden = spy  # type: ignore[method-assign]
    compile_kernels(runner.model, kv_dtype=torch.float32, num_tokens=num_tokens, max_model_len=200)
    lengths = {min(length, num_tokens) for length in (1, 2, 4, 8, 16, 32, 64)}
    assert seen == {(length, seq_len) for length in lengths for seq_len in (length, 200)}
