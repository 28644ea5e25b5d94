"""On the quantised path a request's tokens and probabilities are the same to the bit, whatever else runs.

The embedded model as it is served by default: packed weights, integer sums, one fixed order of all
else. Its own lone run, on the sequential scheduler, is what every other schedule is compared with.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from minivllm_kernels import available_backends

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.startup import load_model, make_engine
from minivllm.models.llama import Llama
from minivllm.request import SamplingParams
from minivllm.weights.files import ModelFiles

pytestmark = pytest.mark.skipif(available_backends()[0] == "reference", reason="the C++ kernels aren't built")

MakeEngine = Callable[..., Engine]
Answer = list[Any]

BLOCK_BYTES = 2 * 30 * 3 * 64 * 16 * 2  # keys and values of 16 tokens in the embedded model, float16
SAMPLINGS = [
    SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=3),
    SamplingParams(max_tokens=24, temperature=1.0, seed=7, ignore_eos=True, logprobs=3),
]


@pytest.fixture(scope="module")
def packed_model(embedded_files: ModelFiles) -> Llama:
    """The embedded model in 4 and 8 bits."""
    model = load_model(EngineConfig(device="cpu"), embedded_files)
    assert model.is_packed
    return model


@pytest.fixture(scope="module")
def make_packed_engine(embedded_files: ModelFiles, packed_model: Llama) -> MakeEngine:
    def make(**settings: Any) -> Engine:
        settings = {"enable_prefix_caching": False, **settings}
        return make_engine(EngineConfig(device="cpu", **settings), embedded_files, packed_model)

    return make


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Lengths around a block's edges, around a chunk's, and one for which attention works in parts."""
    rng = random.Random(3)
    return [[rng.randrange(49152) for _ in range(n)] for n in (700, 1, 15, 16, 17, 100, 129)]


def answers(
    engine: Engine, prompts: list[list[int]], crowd: list[list[int]] | None = None
) -> list[list[Answer]]:
    """For each prompt and each of SAMPLINGS: every token, its probability and those of the likeliest.

    ``crowd`` are further prompts that run beside them, of which nothing is returned.
    """
    found: dict[str, Answer] = {}
    for number, sampling in enumerate(SAMPLINGS):
        for index, prompt in enumerate(prompts):
            found[f"{index} {number}"] = []
            engine.add(f"{index} {number}", prompt, sampling)
    for index, prompt in enumerate(crowd or []):
        engine.add(f"crowd {index}", prompt, SamplingParams(max_tokens=10 + index, ignore_eos=True))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            if event.request_id in found:
                found[event.request_id] += [*event.new_token_ids, *(event.logprobs or [])]
        engine.check_integrity()
    assert all(len(answer) == 48 for answer in found.values())
    return [[found[f"{index} {number}"] for number in range(len(SAMPLINGS))] for index in range(len(prompts))]


@pytest.fixture(scope="module")
def alone(make_packed_engine: MakeEngine, prompts: list[list[int]]) -> list[list[Answer]]:
    return answers(make_packed_engine(scheduler="sequential", max_num_batched_tokens=1024), prompts)


def test_among_fifty_others(
    make_packed_engine: MakeEngine, prompts: list[list[int]], alone: list[list[Answer]]
) -> None:
    rng = random.Random(4)
    crowd = [[rng.randrange(49152) for _ in range(rng.randrange(1, 120))] for _ in range(50)]
    assert answers(make_packed_engine(), prompts, crowd) == alone


@pytest.mark.parametrize("tokens_per_step", [33, 257])
def test_chunked(
    make_packed_engine: MakeEngine,
    prompts: list[list[int]],
    alone: list[list[Answer]],
    tokens_per_step: int,
) -> None:
    assert answers(make_packed_engine(max_num_batched_tokens=tokens_per_step), prompts) == alone


def test_preempted(
    make_packed_engine: MakeEngine, prompts: list[list[int]], alone: list[list[Answer]]
) -> None:
    engine = make_packed_engine(kv_cache_memory=47 * BLOCK_BYTES, max_model_len=740)
    assert answers(engine, prompts) == alone
    assert engine.stats().num_preemptions > 0


def test_contiguous(
    make_packed_engine: MakeEngine, prompts: list[list[int]], alone: list[list[Answer]]
) -> None:
    engine = make_packed_engine(kv_allocation="contiguous", max_model_len=800)
    assert answers(engine, prompts) == alone


def test_from_the_prefix_cache(
    make_packed_engine: MakeEngine, prompts: list[list[int]], alone: list[list[Answer]]
) -> None:
    engine = make_packed_engine(enable_prefix_caching=True)
    answers(engine, prompts)
    assert answers(engine, prompts) == alone
    assert engine.stats().prefix_cache_hits > 700
