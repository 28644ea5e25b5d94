"""Greedy tokens equal transformers', token for token, whatever the schedule and the allocation.

The model is the embedded one, dequantised to float32 on both sides, each by its own loader. A
difference counts as a float near-tie only where the oracle's two best logits lie within 1e-4;
``test_near_ties_are_rare`` says how many there were.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from minivllm.engine.engine import Engine
from minivllm.tokenizer.load import load_tokenizer
from minivllm.weights.files import ModelFiles
from tests.conftest import GREEDY_64, Oracle, run_all

MakeEngine = Callable[..., Engine]

BLOCK_BYTES = 2 * 30 * 3 * 64 * 16 * 4  # keys and values of 16 tokens in the embedded model, float32


@pytest.fixture(scope="module")
def prompts(embedded_files: ModelFiles) -> list[list[int]]:
    """24 prompts of 1 to 600 tokens: English, noise, and eight that share their first 150 tokens."""
    text = (Path(__file__).parents[1] / "LICENSE").read_text()
    tokens = load_tokenizer(embedded_files).encode(text)
    rng = random.Random(20)
    lengths = [1, 2, 15, 16, 17, 33, 64, 100, 129, 257, 511, 600]
    english = [tokens[start : start + n] for n in lengths for start in [rng.randrange(len(tokens) - n)]]
    noise = [[rng.randrange(49152) for _ in range(n)] for n in (1, 3, 48, 300)]
    shared = [tokens[:150] + tokens[start : start + 20] for start in range(200, 1000, 100)]
    return english + noise + shared


def check_all(oracle: Oracle, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    assert len(outputs) == len(prompts) == 24
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == 64
        oracle.check(prompt, output)


def test_one_at_a_time(make_embedded_engine: MakeEngine, prompts: list[list[int]], oracle: Oracle) -> None:
    """The sequential scheduler runs one sequence, then the next."""
    engine = make_embedded_engine(scheduler="sequential", num_parallel=1)
    check_all(oracle, prompts, run_all(engine, prompts, GREEDY_64))


def test_all_at_once(make_embedded_engine: MakeEngine, prompts: list[list[int]], oracle: Oracle) -> None:
    engine = make_embedded_engine(max_num_batched_tokens=8192, enable_prefix_caching=False)
    check_all(oracle, prompts, run_all(engine, prompts, GREEDY_64))
    assert engine.stats().prefix_cache_hits == 0


def test_chunked_prefill(make_embedded_engine: MakeEngine, prompts: list[list[int]], oracle: Oracle) -> None:
    engine = make_embedded_engine(max_num_batched_tokens=64)
    check_all(oracle, prompts, run_all(engine, prompts, GREEDY_64))


def test_preemption(make_embedded_engine: MakeEngine, prompts: list[list[int]], oracle: Oracle) -> None:
    """Without a prefix cache, so that an evicted sequence is really computed again."""
    engine = make_embedded_engine(
        kv_cache_memory=100 * BLOCK_BYTES, max_model_len=700, enable_prefix_caching=False
    )
    check_all(oracle, prompts, run_all(engine, prompts, GREEDY_64))
    assert engine.stats().num_preemptions > 0


def test_prefix_cache(make_embedded_engine: MakeEngine, prompts: list[list[int]], oracle: Oracle) -> None:
    engine = make_embedded_engine(enable_prefix_caching=True)
    first = run_all(engine, prompts, GREEDY_64)
    hits_within = engine.stats().prefix_cache_hits
    assert hits_within > 0, "later prompts of the first run share a prefix with earlier ones"
    again = run_all(engine, prompts[8:20], GREEDY_64)
    # Everything but each prompt's last, incomplete or needed block is in the cache now.
    in_full_blocks = sum((len(prompt) - 1) // 16 * 16 for prompt in prompts[8:20])
    assert engine.stats().prefix_cache_hits - hits_within == in_full_blocks
    check_all(oracle, prompts, first)
    for prompt, output in zip(prompts[8:20], again, strict=True):
        oracle.check(prompt, output)


def test_contiguous(make_embedded_engine: MakeEngine, prompts: list[list[int]], oracle: Oracle) -> None:
    engine = make_embedded_engine(
        kv_allocation="contiguous", max_model_len=700, kv_cache_memory=10 * 44 * BLOCK_BYTES
    )
    check_all(oracle, prompts, run_all(engine, prompts, GREEDY_64))


def test_sequential_contiguous(
    make_embedded_engine: MakeEngine, prompts: list[list[int]], oracle: Oracle
) -> None:
    """The Ollama-style baseline, with four slots."""
    engine = make_embedded_engine(
        scheduler="sequential", kv_allocation="contiguous", num_parallel=4, max_model_len=700
    )
    check_all(oracle, prompts, run_all(engine, prompts, GREEDY_64))


def test_near_ties_are_rare(oracle: Oracle, record_property: Callable[[str, object], None]) -> None:
    """Runs last: more than one near-tie in a thousand tokens would not be chance any more."""
    record_property("near_ties", len(oracle.near_ties))
    print(f"near-ties over all schedules: {len(oracle.near_ties)}")
    assert len(oracle.near_ties) <= 24 * 64 // 1000
