"""All layers together are, to the bit, what their parts say one after the other, on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from minivllm_kernels import (
    DecoderWeights,
    KVPool,
    LayerCache,
    LayerWeights,
    PackedWeight,
    quantize_int8,
)

from tests.kernels.conftest import Backend
from tests.kernels.test_kernels import (
    AttentionCase,
    make_case,
    needs_packed_weights,
    normal,
    random_batch,
    same_bits,
)


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


def make_layer(
    rng: np.random.Generator,
    backend: Backend,
    case: AttentionCase,
    size: int,
    bits: int | None,
    has_bias: bool,
    inner: int = 80,
) -> LayerWeights:
    """Random weights for the case's heads."""
    num_heads, head_dim = case.q_THD.shape[1:]
    qkv_rows = (num_heads + 2 * case.k_cache_PKSD.shape[1]) * head_dim

    def vector(length: int) -> torch.Tensor:
        return normal(rng, length, dtype=torch.float32, device=backend.device)

    def bias(length: int) -> torch.Tensor | None:
        return vector(length) if has_bias else None

    return LayerWeights(
        attention_norm_N=vector(size),
        qkv=make_weight(rng, backend, qkv_rows, size, bits),
        qkv_bias=bias(qkv_rows),
        o=make_weight(rng, backend, size, num_heads * head_dim, bits),
        o_bias=bias(size),
        mlp_norm_N=vector(size),
        gate_up=make_weight(rng, backend, 2 * inner, size, bits),
        gate_up_bias=bias(2 * inner),
        down=make_weight(rng, backend, size, inner, bits),
        down_bias=bias(size),
    )


def slots_of(case: AttentionCase) -> torch.Tensor:
    """Where the step's tokens go."""
    return torch.cat(
        [
            table[position // 16].long() * 16 + position % 16
            for table, length, start, end in zip(
                case.block_tables_BM,
                case.seq_lens_B.tolist(),
                case.query_start_B1[:-1].tolist(),
                case.query_start_B1[1:].tolist(),
                strict=True,
            )
            for position in [torch.arange(length - (end - start), length, device=table.device)]
        ]
    )


def random_angles(rng: np.random.Generator, case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Random frequencies for the case's heads, and a random position for each of its tokens."""
    num_tokens, _, head_dim = case.q_THD.shape
    frequencies = torch.from_numpy(rng.uniform(0, 1, head_dim // 2)).float()
    positions = torch.from_numpy(rng.integers(0, 5000, num_tokens))
    return frequencies.to(case.q_THD.device), positions.to(case.q_THD.device)


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("inner", [80, 72])  # C++ takes what fills its panels in one call
@pytest.mark.parametrize("kind", ["one", "decode", "mixed"])
@pytest.mark.parametrize(("has_bias", "sliding_window"), [(False, None), (True, 20)])
def test_decoder_layers(
    backend: Backend,
    rng: np.random.Generator,
    bits: int | None,
    kind: str,
    inner: int,
    has_bias: bool,
    sliding_window: int | None,
) -> None:
    length = backend.size(600, slow=20)
    batch = [(length, 1)] if kind == "one" else random_batch(rng, kind, 3, length)
    case, size, eps = make_case(rng, backend.device, batch), 48, 1e-5
    num_tokens, num_heads, head_dim = case.q_THD.shape
    layers = [make_layer(rng, backend, case, size, bits, has_bias, inner) for _ in range(2)]
    x = normal(rng, num_tokens, size, dtype=torch.float32, device=backend.device)
    frequencies, positions = random_angles(rng, case)
    slots, tables = slots_of(case), (case.block_tables_BM, case.seq_lens_B, case.query_start_B1)
    kernels = backend.kernels
    cos, sin = kernels.rotary(frequencies, positions)

    # Each layer has a cache of its own: the case's, and its mirror image.
    pairs = [(case.k_cache_PKSD, case.v_cache_PKSD), (case.v_cache_PKSD.clone(), case.k_cache_PKSD.clone())]
    want_pairs = [(k.clone(), v.clone()) for k, v in pairs]
    want, total = x, None
    for layer, (k_cache, v_cache) in zip(layers, want_pairs, strict=True):
        normed, total = kernels.rms_norm(want, layer.attention_norm_N, eps, total)
        heads = kernels.linear(normed, layer.qkv, layer.qkv_bias).view(num_tokens, -1, head_dim)
        kernels.rope_and_write_kv(heads, cos, sin, k_cache, v_cache, slots)
        attended = torch.empty_like(case.q_THD)
        kernels.paged_attention(
            heads[:, :num_heads],
            k_cache,
            v_cache,
            *tables,
            scale=0.3,
            out_THD=attended,
            sliding_window=sliding_window,
        )
        want = kernels.linear(attended.flatten(1), layer.o, layer.o_bias)
        normed, total = kernels.rms_norm(want, layer.mlp_norm_N, eps, total)
        gate_up = kernels.linear(normed, layer.gate_up, layer.gate_up_bias)
        want = kernels.linear(kernels.silu_and_mul(gate_up), layer.down, layer.down_bias)

    pool = KVPool([LayerCache(k, v) for k, v in pairs])
    have = kernels.decoder_layers(
        x.clone(), DecoderWeights(layers), pool, frequencies, positions, slots, *tables,
        eps=eps, scale=0.3, sliding_window=sliding_window,
    )  # fmt: skip
    assert total is not None
    assert not want.isnan().any()
    assert same_bits(have, want + total)
    for have_pair, want_pair in zip(pairs, want_pairs, strict=True):
        for have_cache, want_cache in zip(have_pair, want_pair, strict=True):
            assert same_bits(have_cache, want_cache)


def test_many_tokens(backend: Backend, rng: np.random.Generator) -> None:
    """More than the C++ kernels take at once: each is what it is in a step of its own."""
    if not backend.is_cpp:
        pytest.skip("nothing is taken in parts")
    case, size = make_case(rng, backend.device, [(700, 700)]), 48
    num_tokens = len(case.q_THD)
    weights = DecoderWeights([make_layer(rng, backend, case, size, 4, True)])
    x = normal(rng, num_tokens, size, dtype=torch.float32, device=backend.device)
    frequencies, positions = random_angles(rng, case)
    slots, pool = slots_of(case), KVPool([LayerCache(case.k_cache_PKSD, case.v_cache_PKSD)])

    def run(first: int, end: int) -> torch.Tensor:
        lengths = torch.tensor([end], dtype=torch.int32), torch.tensor([0, end - first], dtype=torch.int32)
        part = slice(first, end)
        return backend.kernels.decoder_layers(
            x[part].clone(), weights, pool, frequencies, positions[part], slots[part],
            case.block_tables_BM, *lengths, eps=1e-5, scale=0.3,
        )  # fmt: skip

    whole = run(0, num_tokens)
    parts = [run(first, min(first + 90, num_tokens)) for first in range(0, num_tokens, 90)]
    assert same_bits(torch.cat(parts), whole)


def test_no_layers(backend: Backend) -> None:
    x, tables = torch.ones(1, 48, device=backend.device), torch.zeros(1, 1, dtype=torch.int32)
    zero, one = torch.zeros(1, dtype=torch.int64, device=backend.device), torch.ones(1, device=backend.device)
    have = backend.kernels.decoder_layers(
        x, DecoderWeights([]), KVPool([]), one, zero, zero, tables, tables, tables, eps=1.0, scale=1.0
    )
    assert have is x


def test_layers_that_do_not_fit_are_refused(backend: Backend, rng: np.random.Generator) -> None:
    if not backend.is_cpp:
        pytest.skip("torch refuses them in its own words")
    case = make_case(rng, backend.device, [(40, 1), (20, 1)])
    layer, x = make_layer(rng, backend, case, 48, 8, False), torch.ones(2, 48)
    frequencies, positions = random_angles(rng, case)
    cache = LayerCache(case.k_cache_PKSD, case.v_cache_PKSD)

    def run(second: LayerWeights, *caches: LayerCache, num_slots: int = 2) -> None:
        backend.kernels.decoder_layers(
            x, DecoderWeights([layer, second]), KVPool([cache, *caches]), frequencies, positions,
            torch.zeros(num_slots, dtype=torch.int64),
            case.block_tables_BM, case.seq_lens_B, case.query_start_B1, eps=1e-5, scale=1.0,
        )  # fmt: skip

    for name, wrong in (("down", PackedWeight(49, 80, 8)), ("gate_up", PackedWeight(64, 48, 8))):
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got \({wrong.rows}, "):
            run(replace(layer, **{name: wrong}), cache)
    with pytest.raises(ValueError, match=r"^all layers must be as the first"):
        run(replace(layer, qkv=PackedWeight(64, 48, 8)), cache)
    with pytest.raises(ValueError, match=r"^all layers must be as the first"):
        run(layer, LayerCache(cache.k_PKSD[:1], cache.v_PKSD[:1]))
    with pytest.raises(ValueError, match=r"^v_PKSD must be as k_PKSD"):
        run(layer, LayerCache(cache.k_PKSD, cache.v_PKSD[:1]))
    with pytest.raises(ValueError, match=r"^o_bias must be contiguous torch.float32 \(48,\)"):
        run(replace(layer, o_bias=torch.ones(47)), cache)
    with pytest.raises(ValueError, match=r"^slots_T must be contiguous torch.int64 \(2,\), got .* \(3,\)"):
        run(layer, cache, num_slots=3)
    with pytest.raises(ValueError, match=r"^decoder_layers: 2 layers .* 1 caches .* don't fit together"):
        run(layer)


def test_what_cpp_would_misread_is_refused(backend: Backend, rng: np.random.Generator) -> None:
    """It gets addresses: another dtype, a gap or a missing tensor would be other numbers, or a crash."""
    if not backend.is_cpp:
        pytest.skip("torch reads all of them")
    kernels, case = backend.kernels, make_case(rng, backend.device, [(40, 1), (20, 1)])
    num_tokens, num_heads, head_dim = case.q_THD.shape
    k_cache, v_cache = case.k_cache_PKSD, case.v_cache_PKSD
    heads = torch.ones(num_tokens, num_heads + 2 * k_cache.shape[1], head_dim)
    frequencies, positions = random_angles(rng, case)
    cos, sin = kernels.rotary(frequencies, positions)
    slots, out, tables = slots_of(case), torch.empty_like(case.q_THD), case.block_tables_BM
    keys, scores = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 50)

    def rope(*tensors: torch.Tensor) -> None:
        kernels.rope_and_write_kv(heads, *tensors)

    def attend(tables: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        kernels.paged_attention(
            case.q_THD, k_cache, v_cache, tables, case.seq_lens_B, case.query_start_B1, scale=1.0, out_THD=out
        )

    gaps, spread = torch.stack((positions, positions), dim=1)[:, 0], k_cache.transpose(2, 3).contiguous()
    for name, call in {
        "positions_T": lambda: kernels.rotary(frequencies, positions.int()),
        "frequencies_F": lambda: kernels.rotary(frequencies.double(), positions),
        "ids_T": lambda: kernels.embedding(gaps, PackedWeight(48, 64, 8)),
        "cos_TF": lambda: rope(cos[:1], sin, k_cache, v_cache, slots),
        "sin_TF": lambda: rope(cos, sin.double(), k_cache, v_cache, slots),
        "k_cache_PKSD": lambda: rope(cos, sin, spread.transpose(2, 3), v_cache, slots),
        "v_cache_PKSD": lambda: rope(cos, sin, k_cache, v_cache.half(), slots),
        "slots_T": lambda: rope(cos, sin, k_cache, v_cache, slots.int()),
        "block_tables_BM": lambda: attend(tables.T.contiguous().T, k_cache, v_cache),
        "keys_L2": lambda: kernels.draw(scores, torch.ones(2)),
        "keys_L2 must": lambda: kernels.draw(scores, torch.ones(2), keys.long()),
        "temperature_L": lambda: kernels.draw(scores, torch.ones(3), keys),
        "residual_TN": lambda: kernels.rms_norm(scores, torch.ones(50), 1e-5, scores.double()),
        "weight_N": lambda: kernels.rms_norm(scores, torch.ones(49), 1e-5),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            call()


def test_more_threads_than_cores(backend: Backend, rng: np.random.Generator) -> None:
    """Threads that come late, or are put off in the midst of their work, change nothing."""
    if not backend.is_cpp:
        pytest.skip("torch's threads")
    case, size = make_case(rng, backend.device, [(700, 1), (90, 20)]), 48
    num_tokens = len(case.q_THD)
    weights = DecoderWeights([make_layer(rng, backend, case, size, 4, True) for _ in range(3)])
    x = normal(rng, num_tokens, size, dtype=torch.float32, device=backend.device)
    frequencies, positions = random_angles(rng, case)
    slots, pool = slots_of(case), KVPool([LayerCache(case.k_cache_PKSD, case.v_cache_PKSD)] * 3)
    tables = case.block_tables_BM, case.seq_lens_B, case.query_start_B1

    def run() -> torch.Tensor:
        return backend.kernels.decoder_layers(
            x.clone(), weights, pool, frequencies, positions, slots, *tables, eps=1e-5, scale=0.3
        )

    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run()
        torch.set_num_threads(8)
        assert all(same_bits(run(), want) for _ in range(50))
    finally:
        torch.set_num_threads(num_threads)
