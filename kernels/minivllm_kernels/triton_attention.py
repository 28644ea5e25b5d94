"""Paged attention in Triton: one kernel for decode, prefill and mixed batches. Shapes as in ``interface.py``.

A program takes one tile: some queries of one sequence, times all G = H / K query heads that share a KV
head, so that each key is loaded once for all of them and the products fill tensor cores. It walks over
the keys that the tile sees, block by block through the table, with an online softmax (Milakov &
Gimelshein 2018; Dao et al. 2022). Where there are too few tiles for the card, each tile's keys are split
over several programs and a second kernel merges their results (Flash-Decoding, Dao et al. 2023).

The grid follows from shapes alone and nothing is copied to the host: a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from minivllm_kernels.interface import BLOCK_SIZE, check_paged_attention

_LOG2_E = math.log2(math.e)
_QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CACHE_DTYPES = (*_QUERY_DTYPES, torch.float8_e4m3fn)
_MAX_HEAD_DIM = 256
_MAX_SPLITS = 64


@triton.jit
def _attend_to_keys(
    sums,
    total,
    largest,
    q_tile,
    positions,
    first,
    end,
    k_head,
    v_head,
    table,
    block_stride,
    slot_stride,
    score_factor,
    softcap_log2,
    window,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """The running softmax (sums, total, largest score) after keys ``first`` to ``end``.

    ``first`` is a multiple of TILE_KEYS; unless IS_MASKED, so is ``end``, and every row sees all of them.
    """
    dims = tl.arange(0, PADDED_DIM)
    for start in range(first, end, TILE_KEYS):
        keys = start + tl.arange(0, TILE_KEYS)
        is_key = keys < end
        # 64 bits: a pool can be larger than 2^31 elements.
        if IS_MASKED:
            blocks = tl.load(table + keys // BLOCK, mask=is_key, other=0).to(tl.int64)
        else:
            blocks = tl.load(table + keys // BLOCK).to(tl.int64)
        places = (blocks * block_stride + (keys % BLOCK) * slot_stride)[:, None] + dims[None, :]
        # What lies past the end may be NaN, and 0 × NaN is NaN: values are masked too.
        if HEAD_DIM != PADDED_DIM:
            is_there = is_key[:, None] & (dims < HEAD_DIM)[None, :]
            k_tile = tl.load(k_head + places, mask=is_there, other=0.0).to(q_tile.dtype)
            v_tile = tl.load(v_head + places, mask=is_there, other=0.0).to(q_tile.dtype)
        elif IS_MASKED:
            k_tile = tl.load(k_head + places, mask=is_key[:, None], other=0.0).to(q_tile.dtype)
            v_tile = tl.load(v_head + places, mask=is_key[:, None], other=0.0).to(q_tile.dtype)
        else:
            k_tile = tl.load(k_head + places).to(q_tile.dtype)
            v_tile = tl.load(v_head + places).to(q_tile.dtype)
        # "ieee": float32 products are exact, not TF32.
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * score_factor
        if HAS_SOFTCAP:  # tanh(x) = 1 - 2 / (1 + e^2x), right for infinities too
            scores = softcap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(scores)))
        if IS_MASKED:
            is_visible = keys[None, :] <= positions[:, None]
            if HAS_WINDOW:
                is_visible &= keys[None, :] > positions[:, None] - window
            scores = tl.where(is_visible, scores, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        weights = tl.exp2(scores - largest[:, None])
        keep = tl.exp2(before - largest)
        total = total * keep + tl.sum(weights, 1)
        sums = tl.dot(weights.to(q_tile.dtype), v_tile, sums * keep[:, None], input_precision="ieee")
    return sums, total, largest


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "window"])
def attention_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    query_start,
    out,
    split_out,
    split_lse,
    num_seqs,
    table_stride,
    window,
    score_factor,
    softcap_log2,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    block_stride,
    kv_head_stride,
    slot_stride,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    IS_DECODE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Program (tile, KV head, split). With splits, results go to split_out and split_lse, else to out."""
    kv_head = tl.program_id(1)
    if IS_DECODE:
        sequence = tl.program_id(0)
        first_token = sequence  # of the sequence, among the T
        num_queries = 1
        first_query = 0  # of this tile, among the sequence's
    else:
        # A sequence's tiles begin at query_start // TILE_QUERIES + its number: there is room for them all,
        # and where they begin needs no sum over sequences. The last tiles see most keys and come first.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        sequence = 0
        past = num_seqs
        while past - sequence > 1:
            middle = (sequence + past) // 2
            if tl.load(query_start + middle) // TILE_QUERIES + middle <= tile:
                sequence = middle
            else:
                past = middle
        first_token = tl.load(query_start + sequence)
        num_queries = tl.load(query_start + sequence + 1) - first_token
        first_query = (tile - first_token // TILE_QUERIES - sequence) * TILE_QUERIES
        if first_query >= num_queries:
            return

    rows = tl.arange(0, TILE_ROWS)
    queries = first_query + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = (rows < TILE_QUERIES * GROUP) & (queries < num_queries)
    tokens = (first_token + queries).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    is_there = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    q_places = (tokens * q_token_stride + heads * q_head_stride)[:, None] + dims[None, :]
    q_tile = tl.load(q + q_places, mask=is_there, other=0.0)

    # Keys that any row of the tile sees: [begin, end), begin at the start of a key tile.
    num_before = tl.load(seq_lens + sequence) - num_queries
    end = num_before + tl.minimum(first_query + TILE_QUERIES, num_queries)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(num_before + first_query - window + 1, 0) // TILE_KEYS * TILE_KEYS
    if NUM_SPLITS > 1:
        split = tl.program_id(2)
        split_keys = tl.cdiv(tl.cdiv(end - begin, NUM_SPLITS), TILE_KEYS) * TILE_KEYS
        begin += split * split_keys
        end = tl.minimum(begin + split_keys, end)

    positions = num_before + queries
    k_head = k_cache + kv_head.to(tl.int64) * kv_head_stride
    v_head = v_cache + kv_head.to(tl.int64) * kv_head_stride
    table = block_tables + sequence.to(tl.int64) * table_stride
    sums = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    # Finite: a row that sees no key of a tile would subtract infinities.
    largest = tl.full([TILE_ROWS], -3.0e38, tl.float32)
    if not IS_DECODE and not HAS_WINDOW:
        # Keys that every row sees need no mask: all but the last few, in a prefill.
        full_end = tl.minimum(
            (num_before + first_query + 1) // TILE_KEYS * TILE_KEYS, end // TILE_KEYS * TILE_KEYS
        )
        sums, total, largest = _attend_to_keys(
            sums, total, largest, q_tile, positions, begin, full_end, k_head, v_head, table,
            block_stride, slot_stride, score_factor, softcap_log2, window,
            BLOCK, HEAD_DIM, PADDED_DIM, TILE_KEYS, HAS_WINDOW, HAS_SOFTCAP, False,
        )  # fmt: skip
        begin = tl.maximum(begin, full_end)
    sums, total, largest = _attend_to_keys(
        sums, total, largest, q_tile, positions, begin, end, k_head, v_head, table,
        block_stride, slot_stride, score_factor, softcap_log2, window,
        BLOCK, HEAD_DIM, PADDED_DIM, TILE_KEYS, HAS_WINDOW, HAS_SOFTCAP, True,
    )  # fmt: skip

    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    if NUM_SPLITS > 1:
        num_heads = tl.num_programs(1) * GROUP
        places = (tokens * num_heads + heads) * NUM_SPLITS + split
        # A split without keys has no weight in the merge, whatever its values.
        lse = tl.where(total > 0.0, largest + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(split_lse + places, lse, mask=is_row)
        tl.store(split_out + (places * HEAD_DIM)[:, None] + dims[None, :], result, mask=is_there)
    else:
        places = tokens * out_token_stride + heads * out_head_stride
        tl.store(out + places[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def merge_kernel(
    split_out,
    split_lse,
    out,
    out_token_stride,
    out_head_stride,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Program (token, head): its splits' results, weighted by the sums of their exponentials."""
    token, head = tl.program_id(0), tl.program_id(1)
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, PADDED_DIM)
    places = (token.to(tl.int64) * tl.num_programs(1) + head) * NUM_SPLITS + splits
    lse = tl.load(split_lse + places)
    largest = tl.maximum(tl.max(lse, 0), -3.0e38)
    weights = tl.exp2(lse - largest)
    values = tl.load(
        split_out + (places * HEAD_DIM)[:, None] + dims[None, :], mask=(dims < HEAD_DIM)[None, :], other=0.0
    )
    total = tl.sum(weights, 0)
    result = tl.sum(values * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    out_row = out + token.to(tl.int64) * out_token_stride + head * out_head_stride
    tl.store(out_row + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program takes at once, and the resources that it gets."""

    rows: int
    """Queries × heads of a group, with padding."""
    queries: int
    keys: int
    num_warps: int
    num_stages: int


@cache
def choose_tile(
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    is_decode: bool,
    capability: tuple[int, int],
) -> Tile:
    """For queries and a cache of these dtypes on this generation of cards; as large as registers allow."""
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    is_float32 = dtype == torch.float32
    # Hoppers and the datacenters' Blackwells multiply from shared memory, and have twice as much of it as
    # other cards, Blackwells with a display (12.x) among them, which multiply from registers.
    is_roomy = (9, 0) <= capability < (12, 0)
    if is_decode or is_float32:
        # A decode is bound by the stream of keys and values: bytes in flight, and little of anything else.
        # Exact float32 products have no tensor cores, and are written out one by one.
        rows = max(16, triton.next_power_of_2(group))
        keys = max(16, min(64, 8192 // padded_dim // (2 if is_float32 else 1)))
    else:
        rows = max(128 if padded_dim <= 128 else 64, triton.next_power_of_2(group))
        # Where products are from registers, converted keys and values take some, too.
        is_tight = capability >= (12, 0) or (cache_dtype != dtype and not is_roomy)
        needs_room = padded_dim > (64 if is_tight else 128)
        keys = 32 if needs_room else 64
    num_warps = 8 if rows >= 128 or rows * padded_dim > 128 * 64 else 4
    # The table is a load before the load. Three stages bring a tile's keys and values when the one before is
    # done with, five while it is being worked on. Where shared memory is small, decodes are better off with
    # more programs on each multiprocessor, and the widest heads don't fit twice.
    fits_twice = is_roomy or cache_dtype.itemsize == 1 or not (is_decode or padded_dim > 128)
    num_stages = 5 if fits_twice and not is_float32 else 3
    return Tile(rows, 1 if is_decode else rows // group, keys, num_warps, num_stages)


@cache
def device_limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors. The interpreter's CPU counts as a small card."""
    if device.type == "cpu":
        return (9, 0), 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def choose_num_splits(num_programs: int, max_keys: int, num_processors: int, is_decode: bool) -> int:
    """A power of two: as many as fill the card, each of at least so many keys that it is worth it."""
    wanted = (3 if is_decode else 2) * num_processors // num_programs
    possible = max_keys // (256 if is_decode else 1024)
    return 1 << (max(1, min(wanted, possible, _MAX_SPLITS)).bit_length() - 1)


def paged_attention(
    q_THD: torch.Tensor,
    k_cache_PKSD: torch.Tensor,
    v_cache_PKSD: torch.Tensor,
    block_tables_BM: torch.Tensor,
    seq_lens_B: torch.Tensor,
    query_start_B1: torch.Tensor,
    *,
    scale: float,
    out_THD: torch.Tensor,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> None:
    """:meth:`KernelBackend.paged_attention`. q, and a cache of floats, may be of any of their dtypes.

    Activations are bfloat16, float16 or float32, the cache one of these or float8_e4m3fn.

    Raises:
        ValueError: tensors that don't fit together, or that this kernel or card has no code for.
    """
    check_paged_attention(
        q_THD, k_cache_PKSD, v_cache_PKSD, block_tables_BM, seq_lens_B, query_start_B1, out_THD,
        sliding_window=sliding_window, softcap=softcap,
    )  # fmt: skip
    launch(
        q_THD, k_cache_PKSD, v_cache_PKSD, block_tables_BM, seq_lens_B, query_start_B1,
        scale=scale, out_THD=out_THD, sliding_window=sliding_window, softcap=softcap,
    )  # fmt: skip


def launch(
    q_THD: torch.Tensor,
    k_cache_PKSD: torch.Tensor,
    v_cache_PKSD: torch.Tensor,
    block_tables_BM: torch.Tensor,
    seq_lens_B: torch.Tensor,
    query_start_B1: torch.Tensor,
    *,
    scale: float,
    out_THD: torch.Tensor,
    sliding_window: int | None,
    softcap: float | None,
    num_splits: int | None = None,
) -> None:
    """:func:`paged_attention` of tensors that fit together, with a number of splits if need be."""
    capability, num_processors = device_limits(q_THD.device)
    _check_support(q_THD, k_cache_PKSD, v_cache_PKSD, block_tables_BM, out_THD, capability)
    num_tokens, num_heads, head_dim = q_THD.shape
    num_seqs, num_kv_heads = seq_lens_B.shape[0], k_cache_PKSD.shape[1]
    if num_tokens == 0:
        return
    is_decode = num_tokens == num_seqs  # every sequence has a query at least
    group = num_heads // num_kv_heads
    tile = choose_tile(group, head_dim, q_THD.dtype, k_cache_PKSD.dtype, is_decode, capability)
    num_tiles = num_seqs if is_decode else num_tokens // tile.queries + num_seqs
    if num_splits is None:
        max_keys = block_tables_BM.shape[1] * BLOCK_SIZE
        num_splits = choose_num_splits(num_tiles * num_kv_heads, max_keys, num_processors, is_decode)
    split_out = split_lse = None
    if num_splits > 1:
        shape = num_tokens, num_heads, num_splits
        split_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q_THD.device)
        split_lse = torch.empty(shape, dtype=torch.float32, device=q_THD.device)
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    attention_kernel[num_tiles, num_kv_heads, num_splits](
        q_THD,
        k_cache_PKSD,
        v_cache_PKSD,
        block_tables_BM,
        seq_lens_B,
        query_start_B1,
        out_THD,
        split_out,
        split_lse,
        num_seqs,
        block_tables_BM.stride(0),
        min(sliding_window or 0, 2**31 - 1),
        # Powers of two are cheaper than of e. With a cap: the exponent of tanh, and the cap's own factor.
        (scale if softcap is None else 2 * scale / softcap) * _LOG2_E,
        (softcap or 0.0) * _LOG2_E,
        *q_THD.stride()[:2],
        *out_THD.stride()[:2],
        *k_cache_PKSD.stride()[:3],
        BLOCK=BLOCK_SIZE,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        TILE_ROWS=tile.rows,
        TILE_QUERIES=tile.queries,
        TILE_KEYS=tile.keys,
        NUM_SPLITS=num_splits,
        IS_DECODE=is_decode,
        HAS_WINDOW=sliding_window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        merge_kernel[num_tokens, num_heads](
            split_out,
            split_lse,
            out_THD,
            *out_THD.stride()[:2],
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            NUM_SPLITS=num_splits,
            num_warps=4,
        )


def _check_support(
    q_THD: torch.Tensor,
    k_cache_PKSD: torch.Tensor,
    v_cache_PKSD: torch.Tensor,
    block_tables_BM: torch.Tensor,
    out_THD: torch.Tensor,
    capability: tuple[int, int],
) -> None:
    if q_THD.dtype not in _QUERY_DTYPES:
        raise ValueError(f"q_THD must be one of {_QUERY_DTYPES} for the Triton kernel, got {q_THD.dtype}")
    if k_cache_PKSD.dtype not in _CACHE_DTYPES:
        raise ValueError(
            f"k_cache_PKSD must be one of {_CACHE_DTYPES} for the Triton kernel, got {k_cache_PKSD.dtype}"
        )
    if k_cache_PKSD.dtype == torch.float8_e4m3fn and capability < (8, 9):
        raise ValueError(
            f"k_cache_PKSD: float8_e4m3fn needs compute capability 8.9 or newer, this card has "
            f"{capability[0]}.{capability[1]}; use the activations' dtype"
        )
    if q_THD.shape[2] > _MAX_HEAD_DIM:
        raise ValueError(
            f"q_THD: D must be at most {_MAX_HEAD_DIM} for the Triton kernel, got {q_THD.shape[2]}"
        )
    for name, tensor in (("q_THD", q_THD), ("k_cache_PKSD", k_cache_PKSD), ("out_THD", out_THD)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous, got strides {tensor.stride()}")
    if v_cache_PKSD.stride() != k_cache_PKSD.stride():
        raise ValueError(
            f"v_cache_PKSD must have the strides of k_cache_PKSD, {k_cache_PKSD.stride()}, "
            f"got {v_cache_PKSD.stride()}"
        )
    if block_tables_BM.stride(-1) != 1:
        raise ValueError(f"block_tables_BM: rows must be contiguous, got strides {block_tables_BM.stride()}")
