"""A layer's two halves are, to the bit, what their parts say one after the other, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from minivllm_kernels import PackedWeight, quantize_int8

from tests.kernels.conftest import Backend
from tests.kernels.test_kernels import make_case, needs_packed_weights, normal, random_batch, same_bits


def make_weight(rng: np.random.Generator, backend: Backend, rows: int, columns: int, bits: int | None) -> Any:
    """Random, packed or not."""
    dense = normal(rng, rows, columns, dtype=torch.float32, device=backend.device) * columns**-0.5
    if bits is None:
        return dense
    needs_packed_weights(backend)
    weight = PackedWeight(rows, columns, bits)
    weight.blocks.random_(0, 60)  # as 4 bits, small scales and any values
    if bits == 8:
        weight.write(0, quantize_int8(dense))
    return weight


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_mlp_layer(
    backend: Backend, rng: np.random.Generator, bits: int | None, has_residual: bool, has_bias: bool
) -> None:
    num_tokens, size, inner = int(rng.integers(1, 40)), 48, 80
    x, residual = normal(rng, 2, num_tokens, size, dtype=torch.float32, device=backend.device)
    norm, down_bias = normal(rng, 2, size, dtype=torch.float32, device=backend.device)
    gate_up_bias = normal(rng, 2 * inner, dtype=torch.float32, device=backend.device)
    gate_up, down = (
        make_weight(rng, backend, 2 * inner, size, bits),
        make_weight(rng, backend, size, inner, bits),
    )
    biases = (gate_up_bias, down_bias) if has_bias else (None, None)
    kernels = backend.kernels

    normed, total = kernels.rms_norm(x, norm, 1e-5, residual if has_residual else None)
    total = total.clone()
    want = kernels.linear(kernels.silu_and_mul(kernels.linear(normed, gate_up, biases[0])), down, biases[1])
    have, have_total = kernels.mlp_layer(
        x, residual if has_residual else None, norm, 1e-5, gate_up, biases[0], down, biases[1]
    )
    assert same_bits(have, want)
    assert same_bits(have_total, total)


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
@pytest.mark.parametrize("sliding_window", [None, 20])
def test_attention_layer(
    backend: Backend, rng: np.random.Generator, bits: int | None, kind: str, sliding_window: int | None
) -> None:
    case = make_case(rng, backend.device, random_batch(rng, kind, 3, backend.size(600, slow=20)))
    num_tokens, num_heads, head_dim = case.q_THD.shape
    num_kv_heads, size = case.k_cache_PKSD.shape[1], 48
    rows = (num_heads + 2 * num_kv_heads) * head_dim
    x, residual = normal(rng, 2, num_tokens, size, dtype=torch.float32, device=backend.device)
    norm, o_bias = normal(rng, 2, size, dtype=torch.float32, device=backend.device)
    qkv_bias = normal(rng, rows, dtype=torch.float32, device=backend.device)
    cos, sin = normal(rng, 2, num_tokens, head_dim, dtype=torch.float32, device=backend.device)
    qkv = make_weight(rng, backend, rows, size, bits)
    o = make_weight(rng, backend, size, num_heads * head_dim, bits)
    slots = torch.cat(
        [
            table[position // 16].long() * 16 + position % 16
            for table, length, start, end in zip(
                case.block_tables_BM,
                case.seq_lens_B.tolist(),
                case.query_start_B1[:-1].tolist(),
                case.query_start_B1[1:].tolist(),
                strict=True,
            )
            for position in [torch.arange(length - (end - start), length, device=backend.device)]
        ]
    )
    kernels = backend.kernels
    caches = case.k_cache_PKSD.clone(), case.v_cache_PKSD.clone()
    tables = case.block_tables_BM, case.seq_lens_B, case.query_start_B1

    normed, total = kernels.rms_norm(x, norm, 1e-5, residual)
    total = total.clone()
    heads = kernels.linear(normed, qkv, qkv_bias).view(num_tokens, -1, head_dim)
    kernels.rope_and_write_kv(heads, cos, sin, *caches, slots)
    attended = torch.empty_like(case.q_THD)
    kernels.paged_attention(
        heads[:, :num_heads], *caches, *tables, scale=0.3, out_THD=attended, sliding_window=sliding_window
    )
    want = kernels.linear(attended.flatten(1), o, o_bias)
    have_caches = case.k_cache_PKSD, case.v_cache_PKSD
    have, have_total = kernels.attention_layer(
        x, residual, norm, 1e-5, qkv, qkv_bias, o, o_bias, cos, sin, *have_caches, slots, *tables,
        scale=0.3, sliding_window=sliding_window,
    )  # fmt: skip
    assert not want.isnan().any()
    assert same_bits(have, want)
    assert same_bits(have_total, total)
    for have_cache, want_cache in zip(have_caches, caches, strict=True):
        assert same_bits(have_cache, want_cache)


def test_layers_refuse_weights_that_do_not_fit(backend: Backend, rng: np.random.Generator) -> None:
    if not backend.is_cpp:
        pytest.skip("torch refuses them in its own words")
    case = make_case(rng, backend.device, [(40, 1), (20, 1)])
    x, norm, cos = torch.ones(2, 48), torch.ones(48), torch.ones(2, 64)
    qkv, o = PackedWeight(12 * 64, 48, 8), PackedWeight(48, 8 * 64 + 32, 8)
    with pytest.raises(ValueError, match=r"^attention_layer: qkv 768 x 48, o 48 x 544,"):
        backend.kernels.attention_layer(
            x, None, norm, 1e-5, qkv, None, o, None, cos, cos, case.k_cache_PKSD, case.v_cache_PKSD,
            torch.zeros(2, dtype=torch.int64), case.block_tables_BM, case.seq_lens_B, case.query_start_B1,
            scale=1.0,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"^gate_up must have 1088 rows for down, got 768"):
        backend.kernels.mlp_layer(x, None, norm, 1e-5, qkv, None, o, None)
