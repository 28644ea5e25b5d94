"""Through the engine: the exact model's greedy tokens, whatever the schedule, the allocation and the graphs.

In 16 bits a batch of another size rounds differently. Two answers may therefore part, but only where the
exact model's two choices lie within the rounding error that transformers itself has there.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.request import SamplingParams
from tests.conftest import run_all
from tests.gpu.conftest import Case

NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
HAS_GRAPHS = "enforce_eager" in {field.name for field in fields(EngineConfig)}

Answers = list[list[int]]


@pytest.fixture(scope="module")
def prompts(case: Case) -> list[list[int]]:
    """12 prompts of random lengths, four of which begin alike."""
    rng = np.random.default_rng(7)
    vocab_size = case.model.config.vocab_size
    lengths = [1, 16, 17, *rng.integers(2, 250, 5).tolist()]
    own = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
    shared = rng.integers(0, vocab_size, 100).tolist()
    return own + [shared + rng.integers(0, vocab_size, 10).tolist() for _ in range(4)]


@pytest.fixture(scope="module")
def alone(case: Case, prompts: list[list[int]]) -> Answers:
    """Each prompt by itself: nothing else in its batch, nothing chunked, evicted or shared."""
    engine = case.make_engine(scheduler="sequential", enable_prefix_caching=False)
    return run_all(engine, prompts, GREEDY)


def check(case: Case, prompts: list[list[int]], answers: Answers, alone: Answers) -> None:
    """Right, and the same as alone."""
    num_clear = 0
    for prompt, answer, other in zip(prompts, answers, alone, strict=True):
        assert len(answer) == NUM_TOKENS
        num_clear += case.oracle.check_greedy(prompt, answer)
        case.oracle.check_same(prompt, answer, other)
    assert num_clear > len(prompts) * NUM_TOKENS // 3, "too few choices were clear to say anything"


def run(case: Case, prompts: list[list[int]], **settings: Any) -> tuple[Engine, Answers]:
    engine = case.make_engine(**{"enable_prefix_caching": False} | settings)
    return engine, run_all(engine, prompts, GREEDY)


def test_one_at_a_time(case: Case, prompts: list[list[int]], alone: Answers) -> None:
    check(case, prompts, alone, alone)


def test_all_at_once(case: Case, prompts: list[list[int]], alone: Answers) -> None:
    _, answers = run(case, prompts)
    check(case, prompts, answers, alone)


def test_the_same_run_gives_the_same_tokens(case: Case, prompts: list[list[int]]) -> None:
    """To the last one: nothing depends on who finishes first on the device."""
    assert run(case, prompts)[1] == run(case, prompts)[1]


@pytest.mark.skipif(not HAS_GRAPHS, reason="the engine has no CUDA graphs")
def test_without_cuda_graphs(case: Case, prompts: list[list[int]], alone: Answers) -> None:
    _, answers = run(case, prompts, enforce_eager=True)
    check(case, prompts, answers, alone)


@pytest.mark.parametrize("tokens_per_step", [33, 64])
def test_chunked_prefill(case: Case, prompts: list[list[int]], alone: Answers, tokens_per_step: int) -> None:
    _, answers = run(case, prompts, max_num_batched_tokens=tokens_per_step)
    check(case, prompts, answers, alone)


def test_preemption(case: Case, rng: np.random.Generator) -> None:
    """Ten short prompts are all let in, and grow to twice what the pool holds."""
    prompts = [rng.integers(0, case.model.config.vocab_size, length).tolist() for length in range(5, 15)]
    sampling = SamplingParams(max_tokens=44, temperature=0.0, ignore_eos=True)
    engine = case.make_engine(
        kv_cache_memory=20 * case.block_bytes, max_model_len=64, enable_prefix_caching=False
    )
    answers = run_all(engine, prompts, sampling)
    assert engine.stats().num_preemptions > 0
    roomy = case.make_engine(scheduler="sequential", enable_prefix_caching=False)
    for prompt, answer, other in zip(prompts, answers, run_all(roomy, prompts, sampling), strict=True):
        assert len(answer) == 44
        case.oracle.check_greedy(prompt, answer)
        case.oracle.check_same(prompt, answer, other)


def test_prefix_cache(case: Case, prompts: list[list[int]], alone: Answers) -> None:
    engine = case.make_engine(enable_prefix_caching=True)
    first = run_all(engine, prompts, GREEDY)
    hits = engine.stats().prefix_cache_hits
    again = run_all(engine, prompts, GREEDY)
    assert engine.stats().prefix_cache_hits > hits
    check(case, prompts, first, alone)
    check(case, prompts, again, alone)


def test_contiguous(case: Case, prompts: list[list[int]], alone: Answers) -> None:
    settings = {"kv_allocation": "contiguous", "enable_prefix_caching": None, "max_model_len": 300}
    _, answers = run(case, prompts, **settings)
    check(case, prompts, answers, alone)


def test_sequential_and_contiguous(case: Case, prompts: list[list[int]], alone: Answers) -> None:
    """The Ollama-style baseline, with three slots."""
    settings = {"kv_allocation": "contiguous", "enable_prefix_caching": None, "max_model_len": 300}
    _, answers = run(case, prompts, scheduler="sequential", num_parallel=3, **settings)
    check(case, prompts, answers, alone)


def test_as_many_sequences_as_come(case: Case, rng: np.random.Generator) -> None:
    """More than any one graph or tile is made for, ending at different steps."""
    vocab_size = case.model.config.vocab_size
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in rng.integers(1, 40, 70)]
    engine = case.make_engine(kv_cache_memory=70 * 4 * case.block_bytes, max_model_len=64)
    outputs: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        outputs[str(index)] = []
        sampling = SamplingParams(max_tokens=1 + index % 12, temperature=0.0, ignore_eos=True)
        engine.add(str(index), prompt, sampling)
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            outputs[event.request_id] += event.new_token_ids
        engine.check_integrity()
    num_clear = 0
    for index, prompt in enumerate(prompts):
        assert len(outputs[str(index)]) == 1 + index % 12
        num_clear += case.oracle.check_greedy(prompt, outputs[str(index)])
    assert num_clear > sum(map(len, outputs.values())) // 3


def test_sampling_repeats_with_its_seed(case: Case, prompts: list[list[int]]) -> None:
    """Every sampling parameter at once, on the device."""
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS,
        min_tokens=3,
        temperature=0.9,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        seed=5,
        logprobs=3,
        ignore_eos=True,
    )
    first, again = (run_all(case.make_engine(), prompts, sampling) for _ in range(2))
    assert first == again
    other = run_all(
        case.make_engine(), prompts, SamplingParams(max_tokens=NUM_TOKENS, seed=6, ignore_eos=True)
    )
    assert first != other
