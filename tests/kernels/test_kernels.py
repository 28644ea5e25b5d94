"""Every backend's kernels against loops over tokens in float64, written here from the definitions."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from minivllm_kernels import (
    BLOCK_SIZE,
    PackedRows,
    PackedWeight,
    QuantizedRows,
    available_backends,
    get_backend,
    quantize_int8,
)

from tests.kernels.conftest import Backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GROUPINGS = [(4, 4), (9, 3), (8, 2), (16, 2), (8, 1), (5, 1)]  # query heads, KV heads
HEAD_DIMS = [16, 20, 64, 80, 96, 128, 256]


def close(have: torch.Tensor, want: np.ndarray, tolerance: float) -> None:
    """Relative error in the Euclidean norm; NaN anywhere fails."""
    difference = np.linalg.norm(have.double().cpu().numpy() - want)
    error = difference / max(float(np.linalg.norm(want)), 1e-30)
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaNs included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def needs_dtype(backend: Backend, dtype: torch.dtype) -> None:
    """Skip what the C++ kernels don't have: their activations are float32."""
    if backend.is_cpp and dtype != torch.float32:
        pytest.skip("activations are float32")


def needs_packed_weights(backend: Backend) -> None:
    """Skip what only CPUs have."""
    if backend.device.type != "cpu":
        pytest.skip("packed weights are for CPUs")


def normal(rng: np.random.Generator, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 1, shape)).to(dtype).to(device)


# paged_attention


@dataclass
class AttentionCase:
    """Arguments of one call. Slots and blocks that hold no sequence's token are NaN, and so is ``out``."""

    q_THD: torch.Tensor
    k_cache_PKSD: torch.Tensor
    v_cache_PKSD: torch.Tensor
    block_tables_BM: torch.Tensor
    seq_lens_B: torch.Tensor
    query_start_B1: torch.Tensor
    scale: float
    out_THD: torch.Tensor
    sliding_window: int | None = None
    softcap: float | None = None

    def run(self, backend: Backend) -> torch.Tensor:
        if backend.is_cpp and self.q_THD.dtype == self.k_cache_PKSD.dtype:
            # The C++ kernels' activations are float32, whatever the cache.
            self.q_THD = self.q_THD.float()
            self.out_THD = self.out_THD.float() if self.out_THD.dtype != torch.float64 else self.out_THD
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        before = {name: value.clone() for name, value in tensors.items()}
        backend.kernels.paged_attention(**vars(self))
        for name, value in tensors.items():
            assert name == "out_THD" or same_bits(value, before[name]), f"{name} was changed"
        return self.out_THD


def make_case(
    rng: np.random.Generator,
    device: torch.device,
    sequences: list[tuple[int, int]],
    *,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> AttentionCase:
    """``sequences``: (tokens in the cache, how many of them are this step's queries)."""
    num_blocks = [-(-length // BLOCK_SIZE) for length, _ in sequences]
    pool_size = sum(num_blocks) + int(rng.integers(1, 8))
    blocks = rng.permutation(pool_size).tolist()
    unused = blocks[sum(num_blocks) :]
    shape = (pool_size, num_kv_heads, BLOCK_SIZE, head_dim)
    k_cache, v_cache = np.full(shape, np.nan), np.full(shape, np.nan)
    # Entries past a sequence's end are never followed: another's block, no block at all, ...
    padding = [unused[0], -1, pool_size, 2**31 - 1, -(2**31)]
    width = max(num_blocks) + int(rng.integers(0, 4))
    tables = rng.choice(padding, (len(sequences), width))
    for row, (length, _) in enumerate(sequences):
        for index in range(num_blocks[row]):
            block = blocks.pop(0)
            tables[row, index] = block
            used = min(BLOCK_SIZE, length - index * BLOCK_SIZE)
            k_cache[block, :, :used] = rng.normal(0, 1, (num_kv_heads, used, head_dim))
            v_cache[block, :, :used] = rng.normal(0, 1, (num_kv_heads, used, head_dim))
    starts = np.cumsum([0] + [queries for _, queries in sequences])

    def integers(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.int32, device=device)

    q = normal(rng, int(starts[-1]), num_heads, head_dim, dtype=dtype, device=device)
    return AttentionCase(
        q_THD=q,
        k_cache_PKSD=torch.from_numpy(k_cache).to(dtype).to(device),
        v_cache_PKSD=torch.from_numpy(v_cache).to(dtype).to(device),
        block_tables_BM=integers(tables),
        seq_lens_B=integers([length for length, _ in sequences]),
        query_start_B1=integers(starts),
        scale=float(rng.uniform(0.5, 1.5)) * head_dim**-0.5,
        out_THD=torch.full_like(q, torch.nan),
    )


def attend_token_by_token(case: AttentionCase) -> np.ndarray:
    """The definition: for each query and head, softmax over the tokens up to its own, in float64."""
    q = case.q_THD.double().cpu().numpy()
    k_cache = case.k_cache_PKSD.double().cpu().numpy()
    v_cache = case.v_cache_PKSD.double().cpu().numpy()
    tables, starts = case.block_tables_BM.tolist(), case.query_start_B1.tolist()
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[1]
    out = np.zeros_like(q)
    for row, length in enumerate(case.seq_lens_B.tolist()):
        slots = [(tables[row][position // 16], position % 16) for position in range(length)]
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            keys = np.stack([k_cache[block, kv_head, offset] for block, offset in slots])
            values = np.stack([v_cache[block, kv_head, offset] for block, offset in slots])
            num_queries = starts[row + 1] - starts[row]
            for index in range(num_queries):
                end = length - num_queries + index + 1
                begin = 0 if case.sliding_window is None else max(0, end - case.sliding_window)
                token = starts[row] + index
                scores = case.scale * (keys[begin:end] @ q[token, head])
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                weights = np.exp(scores - scores.max())
                out[token, head] = weights / weights.sum() @ values[begin:end]
    return out


def random_batch(rng: np.random.Generator, kind: str, num_seqs: int, longest: int) -> list[tuple[int, int]]:
    edges = [1, 2, 15, 16, 17, 31, 32, 33, 48, longest]
    lengths = [
        int(rng.choice(edges)) if rng.random() < 0.4 else int(rng.integers(1, longest + 1))
        for _ in range(num_seqs)
    ]
    queries = {
        "decode": lambda length: 1,
        "prefill": lambda length: length,
        "chunk": lambda length: int(rng.integers(1, length + 1)),
    }
    kinds = [kind if kind != "mixed" else str(rng.choice(list(queries))) for _ in lengths]
    return [(length, queries[name](length)) for length, name in zip(lengths, kinds, strict=True)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPINGS)
def test_attention_groupings_and_head_dims(
    backend: Backend, rng: np.random.Generator, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    sequences = random_batch(rng, "mixed", backend.size(6, slow=2), backend.size(40, slow=20))
    case = make_case(
        rng, backend.device, sequences, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    close(case.run(backend), attend_token_by_token(case), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["decode", "prefill", "chunk", "mixed"])
def test_attention_dtypes(backend: Backend, rng: np.random.Generator, kind: str, dtype: torch.dtype) -> None:
    sequences = random_batch(rng, kind, backend.size(5, slow=2), backend.size(100, slow=60))
    case = make_case(rng, backend.device, sequences, dtype=dtype)
    close(case.run(backend), attend_token_by_token(case), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["decode", "prefill", "chunk", "mixed"])
def test_attention_long_sequences(backend: Backend, rng: np.random.Generator, kind: str) -> None:
    num_seqs = backend.size(24 if kind == "decode" else 3, slow=2)
    longest = backend.size(600, slow=600 if kind == "decode" else 200)
    sequences = [(longest, longest if kind == "prefill" else 1), *random_batch(rng, kind, num_seqs, longest)]
    case = make_case(rng, backend.device, sequences, num_heads=3, num_kv_heads=1, head_dim=16)
    close(case.run(backend), attend_token_by_token(case), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_of_thousands_of_tokens(
    backend: Backend, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    """Decodes, and chunks of a few tokens, late in sequences of up to 4,000."""
    lengths = [4000, *map(int, rng.integers(1000, 4001, 2)), *map(int, rng.integers(1, 1000, 2))]
    lengths = lengths[:: backend.size(1, slow=3)]
    sequences = [(length, int(rng.choice([1, 1, min(5, length)]))) for length in lengths]
    case = make_case(rng, backend.device, sequences, num_heads=6, num_kv_heads=2, dtype=dtype)
    close(case.run(backend), attend_token_by_token(case), TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257])
def test_attention_of_one_sequence(backend: Backend, rng: np.random.Generator, length: int) -> None:
    for num_queries in sorted({1, (length + 1) // 2, backend.size(length, slow=min(length, 40))}):
        case = make_case(rng, backend.device, [(length, num_queries)], num_heads=4, head_dim=16)
        close(case.run(backend), attend_token_by_token(case), TOLERANCE[torch.float32])


def test_attention_of_many_decodes(backend: Backend, rng: np.random.Generator) -> None:
    sequences = random_batch(rng, "decode", backend.size(256, slow=40), 60)
    case = make_case(rng, backend.device, sequences, num_heads=2, num_kv_heads=1, head_dim=16)
    close(case.run(backend), attend_token_by_token(case), TOLERANCE[torch.float32])


def test_attention_of_shared_blocks(backend: Backend, rng: np.random.Generator) -> None:
    """Two sequences with one prefix, as the prefix cache hands it out."""
    case = make_case(rng, backend.device, [(50, 5), (50, 1)])
    case.block_tables_BM[1, :2] = case.block_tables_BM[0, :2]
    close(case.run(backend), attend_token_by_token(case), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_large_scores(backend: Backend, rng: np.random.Generator, dtype: torch.dtype) -> None:
    case = make_case(rng, backend.device, [(40, 3), (70, 70), (33, 1)], dtype=dtype)
    case.scale *= 60.0  # exp of such scores overflows unless the largest is subtracted
    close(case.run(backend), attend_token_by_token(case), 5 * TOLERANCE[dtype])


def test_attention_writes_to_a_view(backend: Backend, rng: np.random.Generator) -> None:
    """q and out may be slices of larger tensors."""
    case = make_case(rng, backend.device, [(40, 3), (20, 20)], head_dim=16)
    num_tokens, num_heads, head_dim = case.q_THD.shape
    wide_q = torch.full((num_tokens, num_heads + 4, head_dim), torch.nan, device=backend.device)
    wide_q[:, :num_heads] = case.q_THD
    case.q_THD = wide_q[:, :num_heads]
    wide_out = torch.full((num_tokens, num_heads + 3, head_dim), torch.nan, device=backend.device)
    case.out_THD = wide_out[:, 1 : num_heads + 1]
    close(case.run(backend), attend_token_by_token(case), TOLERANCE[torch.float32])
    assert wide_out[:, 0].isnan().all()
    assert wide_out[:, num_heads + 1 :].isnan().all()


BAD_ARGUMENTS: list[tuple[str, Any]] = [
    ("q_THD", lambda c: {"q_THD": c.q_THD[:, :3]}),  # 3 heads over 2 KV heads
    ("q_THD", lambda c: {"q_THD": c.q_THD[0]}),
    ("k_cache_PKSD", lambda c: {"k_cache_PKSD": c.k_cache_PKSD[:, :, :8]}),
    ("k_cache_PKSD", lambda c: {"k_cache_PKSD": c.k_cache_PKSD[..., :32]}),
    ("k_cache_PKSD", lambda c: {"k_cache_PKSD": c.k_cache_PKSD[0]}),
    ("v_cache_PKSD", lambda c: {"v_cache_PKSD": c.v_cache_PKSD[:-1]}),
    ("v_cache_PKSD", lambda c: {"v_cache_PKSD": c.v_cache_PKSD[:, :1]}),
    ("v_cache_PKSD", lambda c: {"v_cache_PKSD": c.v_cache_PKSD.double()}),
    ("block_tables_BM", lambda c: {"block_tables_BM": c.block_tables_BM[:1]}),
    ("block_tables_BM", lambda c: {"block_tables_BM": c.block_tables_BM[0]}),
    ("block_tables_BM", lambda c: {"block_tables_BM": c.block_tables_BM.long()}),
    ("seq_lens_B", lambda c: {"seq_lens_B": c.seq_lens_B.long()}),
    ("seq_lens_B", lambda c: {"seq_lens_B": c.seq_lens_B[:, None]}),
    ("query_start_B1", lambda c: {"query_start_B1": c.query_start_B1[:-1]}),
    ("query_start_B1", lambda c: {"query_start_B1": c.query_start_B1.long()}),
    ("out_THD", lambda c: {"out_THD": c.out_THD[:-1]}),
    ("out_THD", lambda c: {"out_THD": c.out_THD[:, :4]}),
    ("out_THD", lambda c: {"out_THD": c.out_THD.double()}),
    ("sliding_window", lambda c: {"sliding_window": 0}),
    ("softcap", lambda c: {"softcap": -50.0}),
    ("softcap", lambda c: {"softcap": math.nan}),
]


@pytest.mark.parametrize(("name", "change"), BAD_ARGUMENTS)
def test_attention_refuses_tensors_that_do_not_fit_together(
    backend: Backend, rng: np.random.Generator, name: str, change: Any
) -> None:
    case = make_case(rng, backend.device, [(40, 3), (20, 1)])
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        dataclasses.replace(case, **change(case)).run(backend)


# rope_and_write_kv and packed weights


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_rotary(backend: Backend, rng: np.random.Generator, num_tokens: int) -> None:
    """Angles are rounded to float32, as in transformers; their cosines and sines are right."""
    frequencies = torch.from_numpy(rng.uniform(0, 1, 21)).float().to(backend.device)
    positions = torch.from_numpy(rng.integers(0, 131072, num_tokens)).to(backend.device)
    have = backend.kernels.rotary(frequencies, positions)
    angles = (positions.float()[:, None] * frequencies).double().cpu()
    for angle, want in zip(have, (angles.cos(), angles.sin()), strict=True):
        assert angle.dtype == torch.float32
        torch.testing.assert_close(angle.double().cpu(), want, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 16), (3, 20), (8, 128)])
def test_rope_and_write_kv(
    backend: Backend, rng: np.random.Generator, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Queries and keys turn in the complex plane; the cache changes at the slots and nowhere else."""
    num_blocks, num_tokens, half = 9, int(rng.integers(1, backend.size(60, slow=10))), head_dim // 2
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    k_cache, v_cache = (normal(rng, *shape, dtype=dtype, device=backend.device) for _ in range(2))
    k_cache[2] = torch.nan
    want_k, want_v = k_cache.clone(), v_cache.clone()
    heads = normal(
        rng, num_tokens, 5 + 2 * num_kv_heads, head_dim, dtype=torch.float32, device=backend.device
    )
    angles = rng.uniform(0, 5000, (num_tokens, half))
    cos, sin = (torch.from_numpy(f(angles)).float().to(backend.device) for f in (np.cos, np.sin))
    wide = heads.double().cpu().numpy()
    turned = (wide[..., :half] + 1j * wide[..., half:]) * np.exp(1j * angles)[:, None]
    rotated = np.concatenate([turned.real, turned.imag], axis=-1)
    slots = rng.permutation(num_blocks * BLOCK_SIZE)[:num_tokens].tolist()
    backend.kernels.rope_and_write_kv(
        heads, cos, sin, k_cache, v_cache, torch.tensor(slots, device=backend.device)
    )
    close(heads[:, :5], rotated[:, :5], TOLERANCE[torch.float32])
    for token, slot in enumerate(slots):
        place = (slot // 16, slice(None), slot % 16)
        close(k_cache[place], rotated[token, 5 : 5 + num_kv_heads], TOLERANCE[dtype])
        close(v_cache[place], wide[token, 5 + num_kv_heads :], TOLERANCE[dtype])
        k_cache[place], v_cache[place] = want_k[place], want_v[place]
    assert same_bits(k_cache, want_k)
    assert same_bits(v_cache, want_v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_write_kv_to_float8(backend: Backend, rng: np.random.Generator, dtype: torch.dtype) -> None:
    """What is beyond float8's range becomes its largest number; NaN stays NaN; other slots stay."""
    if backend.kernels.name != "triton":
        pytest.skip("no float8 here")
    if backend.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no float8")
    num_tokens, device = 6, backend.device
    heads = 300 * normal(rng, num_tokens, 4, 24, dtype=dtype, device=device)
    heads[2, 3, 5] = torch.nan
    heads[3, 3, 5] = torch.inf
    caches = torch.zeros(2, 3, 1, BLOCK_SIZE, 24, device=device).to(torch.float8_e4m3fn)
    slots = torch.tensor(rng.permutation(3 * BLOCK_SIZE)[:num_tokens], device=device)
    cos, sin = torch.ones(num_tokens, 12, device=device), torch.zeros(num_tokens, 12, device=device)
    want = heads.float().clamp(-448, 448).to(torch.float8_e4m3fn).float().cpu()
    backend.kernels.rope_and_write_kv(heads, cos, sin, caches[0], caches[1], slots)
    have = caches.float().cpu().view(2, 3 * BLOCK_SIZE, 24)
    for token, slot in enumerate(slots.tolist()):
        np.testing.assert_array_equal(have[0, slot], want[token, 2])
        np.testing.assert_array_equal(have[1, slot], want[token, 3])
        have[:, slot] = 0.0
    assert not have.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_where_torch_rounds(
    backend: Backend, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    """After each operation: the cosine, its product, the sum, the norm; so it is in transformers."""
    needs_dtype(backend, dtype)
    device, num_tokens, head_dim = backend.device, 7, 64
    heads = normal(rng, num_tokens, 6, head_dim, dtype=dtype, device=device)
    angles = torch.from_numpy(rng.uniform(0, 5000, (num_tokens, 32)))
    cos, sin = (f(angles).float().to(device) for f in (torch.cos, torch.sin))
    turned = torch.cat((-heads[..., 32:], heads[..., :32]), -1)
    want = heads * cos.to(dtype)[:, None].repeat(1, 1, 2) + turned * sin.to(dtype)[:, None].repeat(1, 1, 2)
    caches = torch.zeros(2, 1, 1, BLOCK_SIZE, head_dim, dtype=dtype, device=device)
    values = heads[:, 5].clone()
    slots = torch.arange(num_tokens, device=device)
    backend.kernels.rope_and_write_kv(heads, cos, sin, caches[0], caches[1], slots)
    assert same_bits(heads[:, :4], want[:, :4])
    assert same_bits(caches[0, 0, 0, :num_tokens], want[:, 4])
    assert same_bits(caches[1, 0, 0, :num_tokens], values)

    x, residual = (normal(rng, num_tokens, 200, dtype=dtype, device=device) for _ in range(2))
    weight = normal(rng, 200, dtype=dtype, device=device)
    normed, total = backend.kernels.rms_norm(x, weight, 1e-5, residual)
    assert same_bits(total, x + residual)
    wide = total.double()
    want = weight * (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(dtype)
    # Float32's rounding inside moves a number over an edge of the narrow dtype now and then.
    assert (normed != want).double().mean() < 0.01


def random_rows(rng: np.random.Generator, rows: int, columns: int, bits: int) -> QuantizedRows:
    """Any values, scales and minima."""
    if bits == 8:
        return quantize_int8(torch.from_numpy(rng.normal(0, 1, (rows, columns))))
    num_groups = -(-columns // 32)
    return QuantizedRows(
        4,
        columns,
        torch.from_numpy(rng.integers(0, 256, (rows, num_groups, 16), dtype=np.uint8)),
        torch.from_numpy(rng.uniform(0.01, 0.2, (rows, num_groups))).half(),
        torch.from_numpy(rng.normal(0, 1, (rows, num_groups))).half(),
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), [(1, 7, 16), (5, 100, 50), (33, 576, 1536)])
def test_packed_linear(
    backend: Backend, rng: np.random.Generator, num_tokens: int, rows: int, columns: int, bits: int
) -> None:
    """Against float64 with the weights as they are stored; a token's result is the same alone."""
    needs_packed_weights(backend)
    quantized = random_rows(rng, rows, columns, bits)
    weight = PackedWeight(rows, columns, bits)
    weight.write(0, quantized)
    x = normal(rng, num_tokens, columns, dtype=torch.float32, device=backend.device)
    bias = normal(rng, rows, dtype=torch.float32, device=backend.device)
    have = backend.kernels.linear(x, weight, bias)
    want = x.double().numpy() @ quantized.dequantize().double().numpy().T + bias.double().numpy()
    close(have, want, 5e-2 if backend.is_cpp else 1e-5)
    if backend.is_cpp:
        for token in range(num_tokens):
            assert same_bits(backend.kernels.linear(x[token : token + 1], weight, bias)[0], have[token])
    ids = torch.from_numpy(rng.integers(0, rows, 9))
    close(backend.kernels.embedding(ids, weight), quantized.dequantize().double().numpy()[ids.numpy()], 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_packed_wherever_they_begin(rng: np.random.Generator, bits: int) -> None:
    """Also where they fill a panel's worth of rows, but not one panel."""
    weight, start, sources = PackedWeight(40, 64, bits), 0, []
    for num_rows in (8, 16, 16):
        source = random_rows(rng, num_rows, 64, bits)
        PackedRows(weight, start, num_rows).copy_(source)
        sources.append(source)
        start += num_rows
    have = weight.read()
    assert torch.equal(have.values, torch.cat([source.values for source in sources]))
    assert torch.equal(have.scales, torch.cat([source.scales for source in sources]))
    assert torch.equal(have.dequantize(), torch.cat([source.dequantize() for source in sources]))


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_linear_of_any_number_of_tokens(backend: Backend, rng: np.random.Generator, bits: int) -> None:
    """However tokens are divided into tiles, each one's result is what it is alone."""
    if not backend.is_cpp:
        pytest.skip("only they divide tokens into tiles")
    rows, columns = 40, 100
    weight = PackedWeight(rows, columns, bits)
    weight.blocks.random_(0, 60)
    x = normal(rng, 300, columns, dtype=torch.float32, device=backend.device)
    alone = torch.cat([backend.kernels.linear(token[None], weight) for token in x])
    for num_tokens in [*range(1, 70), *rng.integers(70, 300, 10)]:
        first = int(rng.integers(0, 301 - num_tokens))
        have = backend.kernels.linear(x[first : first + num_tokens], weight)
        assert same_bits(have, alone[first : first + num_tokens]), f"{num_tokens} tokens"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 1e-40])
def test_packed_linear_of_extreme_activations(backend: Backend, bits: int, bad: float) -> None:
    """What isn't finite stays visible, in its own token alone; what is tiny or huge doesn't overflow."""
    needs_packed_weights(backend)
    rows = torch.eye(40, 70) / 2
    weight = PackedWeight(40, 70, bits)
    scales = torch.full((40, 3), 0.5).half()
    values = torch.zeros(40, 3, 16, dtype=torch.uint8)
    weight.write(0, quantize_int8(rows) if bits == 8 else QuantizedRows(4, 70, values, scales, -scales))
    x = torch.ones(8, 70)
    x[3, :32] = bad * torch.eye(32)[5] if math.isfinite(bad) else 1.0
    x[3, 5] = bad
    have = backend.kernels.linear(x, weight)
    assert have[3].isfinite().all() == math.isfinite(bad)
    others = [token for token in range(8) if token != 3 or math.isfinite(bad)]
    want = x[others].double().numpy() @ weight.read().dequantize().double().numpy().T
    close(have[others], want, 5e-2 if backend.is_cpp else 1e-5)


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("has_residual", [False, True])
def test_fused_products_are_their_parts(
    backend: Backend, rng: np.random.Generator, has_residual: bool, bits: int | None
) -> None:
    """rms_norm, then linear: to the bit what the kernels say one after the other."""
    num_tokens, rows, columns, device = int(rng.integers(1, 40)), 48, 80, backend.device
    x, residual = (normal(rng, num_tokens, columns, dtype=torch.float32, device=device) for _ in range(2))
    norm, bias = (normal(rng, size, dtype=torch.float32, device=device) for size in (columns, rows))
    weight: Any = normal(rng, rows, columns, dtype=torch.float32, device=device)
    if bits is not None:
        needs_packed_weights(backend)
        rounded, weight = weight, PackedWeight(rows, columns, bits)
        weight.blocks.random_(0, 60)
        if bits == 8:
            weight.write(0, quantize_int8(rounded))
    kernels = backend.kernels
    normed, total = kernels.rms_norm(x, norm, 1e-5, residual if has_residual else None)
    want = kernels.linear(normed, weight, bias), total.clone()
    have = kernels.rms_norm_linear(x, residual if has_residual else None, norm, 1e-5, weight, bias)
    assert same_bits(have[0], want[0])
    assert same_bits(have[1], want[1])


# The rest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 100, 576, 4096])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm(
    backend: Backend, rng: np.random.Generator, has_residual: bool, size: int, dtype: torch.dtype
) -> None:
    needs_dtype(backend, dtype)
    num_tokens, eps = int(rng.integers(1, 20)), float(rng.choice([1e-6, 1e-5, 1e-2]))
    x, residual = (normal(rng, num_tokens, size, dtype=dtype, device=backend.device) for _ in range(2))
    weight = normal(rng, size, dtype=dtype, device=backend.device)
    x_before, residual_before = x.clone(), residual.clone()
    normed, total = backend.kernels.rms_norm(x, weight, eps, residual if has_residual else None)
    assert same_bits(x, x_before)
    assert same_bits(residual, residual_before)
    assert normed.dtype == total.dtype == dtype

    wide = x.double().cpu().numpy()
    if has_residual:
        wide = wide + residual.double().cpu().numpy()
        close(total, wide, TOLERANCE[dtype])
    else:
        assert same_bits(total, x)
    want = np.stack([row / np.sqrt((row**2).mean() + eps) for row in wide]) * weight.double().cpu().numpy()
    close(normed, want, TOLERANCE[dtype])


def test_rms_norm_does_not_overflow_in_half_precision(backend: Backend) -> None:
    """Squares of values that float16 holds are beyond float16."""
    needs_dtype(backend, torch.float16)
    x = torch.full((2, 64), 3000.0, dtype=torch.float16, device=backend.device)
    weight = torch.ones(64, dtype=torch.float16, device=backend.device)
    normed, _ = backend.kernels.rms_norm(x, weight, 1e-5)
    close(normed, np.ones((2, 64)), 1e-3)


def test_rms_norm_adds_eps_under_the_root(backend: Backend) -> None:
    x = torch.full((1, 16), 1e-3, device=backend.device)
    normed, _ = backend.kernels.rms_norm(x, torch.ones(16, device=backend.device), 1e-6)
    close(normed, np.full((1, 16), 1e-3 / np.sqrt(2e-6)), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 1536])
def test_silu_and_mul(backend: Backend, rng: np.random.Generator, size: int, dtype: torch.dtype) -> None:
    needs_dtype(backend, dtype)
    gate_up = 4 * normal(rng, int(rng.integers(1, 20)), 2 * size, dtype=dtype, device=backend.device)
    wide = gate_up.double().cpu().numpy()
    gate, up = wide[:, :size], wide[:, size:]
    have = backend.kernels.silu_and_mul(gate_up)
    assert have.dtype == dtype
    close(have, gate / (1 + np.exp(-gate)) * up, TOLERANCE[dtype])


def test_silu_and_mul_of_extreme_gates(backend: Backend) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 2.0, 3.0]], device=backend.device)
    have = backend.kernels.silu_and_mul(gate_up)
    close(have, np.array([[0.0, 400.0, 0.0]]), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), [(1, 7, 16), (5, 100, 64), (33, 576, 1536)])
def test_linear(
    backend: Backend,
    rng: np.random.Generator,
    num_tokens: int,
    rows: int,
    columns: int,
    has_bias: bool,
    dtype: torch.dtype,
) -> None:
    needs_dtype(backend, dtype)
    x = normal(rng, num_tokens, columns, dtype=dtype, device=backend.device)
    weight = normal(rng, rows, columns, dtype=dtype, device=backend.device)
    bias = normal(rng, rows, dtype=dtype, device=backend.device) * 10
    have = backend.kernels.linear(x, weight, bias if has_bias else None)
    want = x.double().cpu().numpy() @ weight.double().cpu().numpy().T
    if has_bias:
        want = want + bias.double().cpu().numpy()
    assert have.dtype == dtype
    close(have, want, TOLERANCE[dtype])


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'fastest'.*reference"):
        get_backend("fastest")
    with pytest.raises(ValueError, match=r"'portable' for cuda"):
        get_backend("portable", "cuda")
    assert get_backend("auto").name == available_backends()[0]
