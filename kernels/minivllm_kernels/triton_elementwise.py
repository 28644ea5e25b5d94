"""RMSNorm, rotary embedding with the write to the cache, and SwiGLU's product in Triton.

Shapes as in ``interface.py``. Each is bound by memory, so each reads and writes everything once. Where
torch would round to 16 bits between two operations, so do these: a checkpoint's numbers come out as
they do in the reference, and in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minivllm_kernels.interface import BLOCK_SIZE

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CACHE_DTYPES = (*_DTYPES, torch.float8_e4m3fn)


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    normed,
    total,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Program (token): a row is held in registers from the one reading to the one writing."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    is_there = columns < SIZE
    dtype: tl.constexpr = x.dtype.element_ty
    wide = tl.load(x + row * x_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + row * residual_stride + columns, mask=is_there, other=0.0).to(tl.float32)
        rounded = wide.to(dtype)
        tl.store(total + row * SIZE + columns, rounded, mask=is_there)
        wide = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    result = (wide * factor).to(dtype).to(tl.float32)
    result *= tl.load(weight + columns, mask=is_there, other=0.0).to(tl.float32)
    tl.store(normed + row * SIZE + columns, result.to(dtype), mask=is_there)


@triton.jit
def silu_and_mul_kernel(gate_up, out, row_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (token, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < SIZE
    gate = tl.load(gate_up + row * row_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + SIZE + columns, mask=is_there, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * SIZE + columns, (activated * up).to(dtype), mask=is_there)


@triton.jit
def _to_cache(values, dtype: tl.constexpr):
    """In the cache's dtype. Float8's largest number is 448; NaN stays NaN."""
    if dtype == tl.float8e4nv:
        wide = values.to(tl.float32)
        result = tl.where(wide > 448.0, 448.0, tl.where(wide < -448.0, -448.0, wide)).to(dtype)
    else:
        result = values.to(dtype)
    return result


@triton.jit
def rope_and_write_kv_kernel(
    heads,
    cos,
    sin,
    k_cache,
    v_cache,
    slots,
    token_stride,
    angle_stride,
    block_stride,
    kv_head_stride,
    slot_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program (token, some of the query, key and value heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    pair = tl.arange(0, PADDED_HALF)[None, :]
    is_there = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (pair < HALF)
    places = heads + token * token_stride + head * (2 * HALF) + pair
    first = tl.load(places, mask=is_there, other=0.0)
    second = tl.load(places + HALF, mask=is_there, other=0.0)
    dtype = first.dtype
    c = tl.load(cos + token * angle_stride + pair, mask=pair < HALF, other=0.0).to(dtype).to(tl.float32)
    s = tl.load(sin + token * angle_stride + pair, mask=pair < HALF, other=0.0).to(dtype).to(tl.float32)
    x, y = first.to(tl.float32), second.to(tl.float32)
    rotated_x = ((x * c).to(dtype).to(tl.float32) - (y * s).to(dtype).to(tl.float32)).to(dtype)
    rotated_y = ((y * c).to(dtype).to(tl.float32) + (x * s).to(dtype).to(tl.float32)).to(dtype)

    is_query = is_there & (head < NUM_HEADS)
    tl.store(places, rotated_x, mask=is_query)
    tl.store(places + HALF, rotated_y, mask=is_query)
    # 64 bits: a pool can be larger than 2^31 elements.
    slot = tl.load(slots + token)
    offset = slot // SLOTS * block_stride + slot % SLOTS * slot_stride
    is_key = is_there & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    keys = k_cache + offset + (head - NUM_HEADS) * kv_head_stride + pair
    k_dtype: tl.constexpr = k_cache.dtype.element_ty
    tl.store(keys, _to_cache(rotated_x, k_dtype), mask=is_key)
    tl.store(keys + HALF, _to_cache(rotated_y, k_dtype), mask=is_key)
    is_value = is_there & (head >= NUM_HEADS + NUM_KV_HEADS)
    values = v_cache + offset + (head - NUM_HEADS - NUM_KV_HEADS) * kv_head_stride + pair
    v_dtype: tl.constexpr = v_cache.dtype.element_ty
    tl.store(values, _to_cache(first, v_dtype), mask=is_value)
    tl.store(values + HALF, _to_cache(second, v_dtype), mask=is_value)


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """How a row is laid over a program's threads, by rms_norm and silu_and_mul."""

    block: int
    """Columns in a program: a power of two."""
    num_warps: int


def choose_rms_norm_launch(size: int) -> RowLaunch:
    """Whole rows: up to 16 numbers for each thread, of as many threads as a program may have."""
    block = triton.next_power_of_2(size)
    return RowLaunch(block, min(max(block // 512, 1), 16))


def choose_silu_and_mul_launch(size: int) -> RowLaunch:
    """Short blocks: a step with few tokens has to fill the card too."""
    return RowLaunch(min(triton.next_power_of_2(size), 1024), 4)


@dataclass(frozen=True, slots=True)
class RopeLaunch:
    """A program's tile of heads × pairs, both powers of two."""

    heads: int
    padded_half: int
    num_warps: int


def choose_rope_launch(num_heads: int, head_dim: int) -> RopeLaunch:
    """For ``num_heads`` queries, keys and values together: about 512 pairs, in 4 warps."""
    padded_half = triton.next_power_of_2(head_dim // 2)
    heads = min(triton.next_power_of_2(num_heads), max(512 // padded_half, 1))
    return RopeLaunch(heads, padded_half, 4)


def rms_norm(
    x_TN: torch.Tensor, weight_N: torch.Tensor, eps: float, residual_TN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:meth:`KernelBackend.rms_norm`."""
    x_TN = _rows("x_TN", x_TN)
    num_tokens, size = x_TN.shape
    if residual_TN is not None:
        residual_TN = _rows("residual_TN", residual_TN)
    normed_TN = torch.empty(num_tokens, size, dtype=x_TN.dtype, device=x_TN.device)
    sum_TN = x_TN if residual_TN is None else torch.empty_like(normed_TN)
    if num_tokens == 0:
        return normed_TN, sum_TN
    launch = choose_rms_norm_launch(size)
    rms_norm_kernel[num_tokens,](
        x_TN,
        residual_TN,
        weight_N,
        normed_TN,
        sum_TN,
        x_TN.stride(0),
        0 if residual_TN is None else residual_TN.stride(0),
        eps,
        SIZE=size,
        PADDED=launch.block,
        HAS_RESIDUAL=residual_TN is not None,
        num_warps=launch.num_warps,
    )
    return normed_TN, sum_TN


def silu_and_mul(gate_up_TI2: torch.Tensor) -> torch.Tensor:
    """:meth:`KernelBackend.silu_and_mul`."""
    gate_up_TI2 = _rows("gate_up_TI2", gate_up_TI2)
    num_tokens, size = gate_up_TI2.shape[0], gate_up_TI2.shape[1] // 2
    out_TI = torch.empty(num_tokens, size, dtype=gate_up_TI2.dtype, device=gate_up_TI2.device)
    if num_tokens == 0:
        return out_TI
    launch = choose_silu_and_mul_launch(size)
    silu_and_mul_kernel[num_tokens, triton.cdiv(size, launch.block)](
        gate_up_TI2,
        out_TI,
        gate_up_TI2.stride(0),
        SIZE=size,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return out_TI


def rope_and_write_kv(
    heads_TAD: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    k_cache_PKSD: torch.Tensor,
    v_cache_PKSD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """:meth:`KernelBackend.rope_and_write_kv`.

    Raises:
        ValueError: heads that aren't contiguous, or a dtype that there is no code for.
    """
    num_tokens, num_heads, head_dim = heads_TAD.shape
    num_kv_heads = k_cache_PKSD.shape[1]
    if heads_TAD.dtype not in _DTYPES or heads_TAD.stride()[1:] != (head_dim, 1):
        raise ValueError(
            f"heads_TAD must be bfloat16, float16 or float32 with contiguous heads, "
            f"got {heads_TAD.dtype} with strides {heads_TAD.stride()}"
        )
    for name, cache_PKSD in (("k_cache_PKSD", k_cache_PKSD), ("v_cache_PKSD", v_cache_PKSD)):
        if cache_PKSD.dtype not in _CACHE_DTYPES or cache_PKSD.stride() != v_cache_PKSD.stride():
            raise ValueError(
                f"{name} must have one of the dtypes {', '.join(map(str, _CACHE_DTYPES))} and the strides of "
                f"v_cache_PKSD, got {cache_PKSD.dtype} with {cache_PKSD.stride()}"
            )
    if num_tokens == 0:
        return
    launch = choose_rope_launch(num_heads, head_dim)
    rope_and_write_kv_kernel[num_tokens, triton.cdiv(num_heads, launch.heads)](
        heads_TAD,
        cos_TF,
        sin_TF,
        k_cache_PKSD,
        v_cache_PKSD,
        slots_T,
        heads_TAD.stride(0),
        cos_TF.stride(0),
        *k_cache_PKSD.stride()[:3],
        NUM_HEADS=num_heads - 2 * num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        TILE_HEADS=launch.heads,
        PADDED_HALF=launch.padded_half,
        SLOTS=BLOCK_SIZE,
        num_warps=launch.num_warps,
    )


def _rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """``x`` with contiguous rows; refuses another dtype."""
    if x.ndim != 2 or x.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be [T, N] of bfloat16, float16 or float32, got {x.dtype} {tuple(x.shape)}"
        )
    return x if x.stride(1) == 1 else x.contiguous()
