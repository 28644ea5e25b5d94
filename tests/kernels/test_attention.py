"""Sliding windows, soft caps and 8-bit caches: every backend against the loops of ``test_kernels.py``."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from minivllm_kernels import BLOCK_SIZE

from tests.kernels.conftest import Backend
from tests.kernels.test_kernels import (
    DTYPES,
    TOLERANCE,
    attend_token_by_token,
    close,
    make_case,
    random_batch,
    same_bits,
)

FLOAT8_MAX = 448.0


@pytest.mark.parametrize("window", [1, 2, 17, 40, 64, 100, 2**40])
def test_sliding_windows(backend: Backend, rng: np.random.Generator, window: int) -> None:
    sequences = [(130, 3), *random_batch(rng, "mixed", backend.size(6, slow=2), 130)]
    case = make_case(rng, backend.device, sequences, num_heads=6, head_dim=16)
    case.sliding_window = window
    close(case.run(backend), attend_token_by_token(case), TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [100, 1500])
def test_sliding_windows_late_in_long_sequences(
    backend: Backend, rng: np.random.Generator, window: int
) -> None:
    """Whole ranges of keys lie before every window."""
    sequences = [(2000, 1), (1700, 9), (513, 1), (640, 130)][: backend.size(4, slow=2)]
    case = make_case(rng, backend.device, sequences, num_heads=4, head_dim=16)
    case.sliding_window = window
    close(case.run(backend), attend_token_by_token(case), TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("softcap", [1.0, 50.0])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_soft_caps(
    backend: Backend, rng: np.random.Generator, kind: str, softcap: float, window: int | None
) -> None:
    sequences = [(90, 1), *random_batch(rng, kind, backend.size(5, slow=2), 100)]
    case = make_case(rng, backend.device, sequences, head_dim=20)
    case.scale *= 4 * softcap  # so that the cap matters
    case.softcap, case.sliding_window = softcap, window
    close(case.run(backend), attend_token_by_token(case), 2 * TOLERANCE[torch.float32])


def test_soft_caps_of_huge_scores(backend: Backend, rng: np.random.Generator) -> None:
    """Beyond what exp can hold, the cap is the score.

    Queries and keys are small whole numbers, so that their products are exact: a product near
    zero would otherwise be scaled up with its rounding, and the cap's middle is steep.
    """
    case = make_case(rng, backend.device, [(40, 3), (33, 1)])
    case.q_THD, case.k_cache_PKSD = case.q_THD.mul(3).round(), case.k_cache_PKSD.mul(3).round()
    case.scale, case.softcap = 1e6, 2.0
    close(case.run(backend), attend_token_by_token(case), 2 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_caches(backend: Backend, rng: np.random.Generator, dtype: torch.dtype) -> None:
    sequences = [(50, 50), *random_batch(rng, "mixed", backend.size(5, slow=2), 100)]
    case = make_case(rng, backend.device, sequences, head_dim=32, dtype=dtype)
    case.k_cache_PKSD, case.v_cache_PKSD = (
        cache.to(torch.float8_e4m3fn) for cache in (case.k_cache_PKSD, case.v_cache_PKSD)
    )
    if backend.is_cpp:
        case.q_THD, case.out_THD = case.q_THD.float(), case.out_THD.float()
        with pytest.raises(ValueError, match=r"a KV cache must be of .*bfloat16.* got torch.float8_e4m3fn"):
            backend.kernels.paged_attention(**vars(case))
        return
    backend.kernels.paged_attention(**vars(case))
    close(case.out_THD, attend_token_by_token(case), TOLERANCE[dtype])


def test_what_is_beyond_float8_is_written_as_its_largest(backend: Backend, rng: np.random.Generator) -> None:
    num_tokens, head_dim, device = 5, 16, backend.device
    heads = torch.from_numpy(rng.normal(0, 300, (num_tokens, 4, head_dim))).float().to(device)
    heads[0, 2, 3], heads[1, 3, 4], heads[2, 3, 5] = -1e4, 1e4, torch.nan
    k, v = heads[:, 2].clone(), heads[:, 3].clone()
    cos, sin = (
        torch.ones(num_tokens, head_dim // 2, device=device),
        torch.zeros(num_tokens, head_dim // 2, device=device),
    )
    k_cache, v_cache = torch.zeros(2, 2, 1, BLOCK_SIZE, head_dim, device=device).to(torch.float8_e4m3fn)
    slots = torch.from_numpy(rng.permutation(2 * BLOCK_SIZE)[:num_tokens]).to(device)
    if backend.is_cpp:
        with pytest.raises(ValueError, match=r"a KV cache must be of .* got torch.float8_e4m3fn"):
            backend.kernels.rope_and_write_kv(heads, cos, sin, k_cache, v_cache, slots)
        return
    backend.kernels.rope_and_write_kv(heads, cos, sin, k_cache, v_cache, slots)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        want = torch.zeros(2 * BLOCK_SIZE, head_dim, device=device)
        want[slots] = rows.clamp(-FLOAT8_MAX, FLOAT8_MAX)
        # Half of float8's spacing, 2^-4 of a number's size; what isn't a number stays visible.
        have = cache.float().view(-1, head_dim)
        torch.testing.assert_close(have, want, rtol=2**-4, atol=2**-9, equal_nan=True)


@pytest.mark.parametrize(
    ("window", "softcap", "num_heads", "head_dim", "dtype"),
    [
        (None, None, 6, 16, torch.float32),
        (7, None, 2, 64, torch.bfloat16),
        (600, None, 10, 128, torch.float16),
        (None, 5.0, 8, 64, torch.float16),
        (7, 5.0, 14, 20, torch.bfloat16),
        (600, 5.0, 6, 128, torch.bfloat16),
    ],
)
def test_cpp_attention_of_a_token_is_the_same_alone(
    backend: Backend,
    rng: np.random.Generator,
    window: int | None,
    softcap: float | None,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """To the bit, whether a token comes in a prefill, in a chunk or as a decode."""
    if not backend.is_cpp:
        pytest.skip("only the C++ kernels promise it")
    sequences = [(700, 700), (40, 40)]
    case = make_case(rng, backend.device, sequences, num_heads=num_heads, head_dim=head_dim, dtype=dtype)
    case.sliding_window, case.softcap = window, softcap
    together = case.run(backend)
    starts = case.query_start_B1.tolist()
    for row, position in [(0, 699), (0, 600), (0, 37), (1, 39), (1, 3)]:
        token = starts[row] + position
        alone = dataclasses.replace(
            case,
            q_THD=case.q_THD[token : token + 1],
            block_tables_BM=case.block_tables_BM[row : row + 1],
            seq_lens_B=torch.tensor([position + 1], dtype=torch.int32),
            query_start_B1=torch.tensor([0, 1], dtype=torch.int32),
            out_THD=torch.full_like(case.out_THD[:1], torch.nan),
        )
        assert same_bits(alone.run(backend)[0], together[token])


@pytest.mark.parametrize(("num_splits", "dtype"), [(2, torch.bfloat16), (8, torch.float32)])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kind", ["decode", "chunk"])
def test_splits_of_the_triton_kernel(
    backend: Backend,
    rng: np.random.Generator,
    kind: str,
    window: int | None,
    num_splits: int,
    dtype: torch.dtype,
) -> None:
    """Several splits of long sequences, and splits without a key of short ones, merge to the whole."""
    if backend.kernels.name != "triton":
        pytest.skip("only the Triton kernel has splits to choose")
    from minivllm_kernels.triton_attention import launch

    chunk = 1 if kind == "decode" else 3
    sequences = [(1, 1), (300, chunk), (70, 1), (601, 1)]
    case = make_case(rng, backend.device, sequences, num_heads=3, num_kv_heads=1, head_dim=20, dtype=dtype)
    case.sliding_window = window
    launch(**vars(case), num_splits=num_splits)
    close(case.out_THD, attend_token_by_token(case), TOLERANCE[dtype])
