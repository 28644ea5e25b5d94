"""Every kernel in plain torch, on any device and in any floating dtype. See ``interface.py`` for shapes.

The other backends are tested against this one in float64. It is also what runs where nothing
faster does, so it works on whole batches: there is no Python loop over tokens.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F

from minivllm_kernels import reference_sampling
from minivllm_kernels.interface import BLOCK_SIZE, KernelBackend, check_paged_attention
from minivllm_kernels.layers import Weight
from minivllm_kernels.packed import PackedWeight

_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


class ReferenceBackend(KernelBackend):
    """Plain torch."""

    name = "reference"

    def linear(self, x_TN: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x_TN, _dense(weight, x_TN.dtype), bias)

    def embedding(self, ids_T: torch.Tensor, weight: Weight) -> torch.Tensor:
        return _dense(weight, torch.float32)[ids_T]

    def rms_norm(
        self, x_TN: torch.Tensor, weight_N: torch.Tensor, eps: float, residual_TN: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual_TN is not None:
            x_TN = x_TN + residual_TN
        wide = x_TN if x_TN.dtype == torch.float64 else x_TN.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight_N * normed.to(x_TN.dtype), x_TN

    def rope_and_write_kv(
        self,
        heads_TAD: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        k_cache_PKSD: torch.Tensor,
        v_cache_PKSD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        num_kv_heads = k_cache_PKSD.shape[1]
        rotated_TAD, v_TKD = heads_TAD[:, :-num_kv_heads], heads_TAD[:, -num_kv_heads:]
        cos, sin = cos_TF.to(heads_TAD.dtype)[:, None], sin_TF.to(heads_TAD.dtype)[:, None]
        first, second = rotated_TAD.chunk(2, dim=-1)
        rotated_TAD = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        heads_TAD[:, : -2 * num_kv_heads] = rotated_TAD[:, :-num_kv_heads]
        blocks, offsets = slots_T // BLOCK_SIZE, slots_T % BLOCK_SIZE
        k_TKD = rotated_TAD[:, -num_kv_heads:]
        for cache_PKSD, rows_TKD in ((k_cache_PKSD, k_TKD), (v_cache_PKSD, v_TKD)):
            if cache_PKSD.dtype == torch.float8_e4m3fn:  # torch makes NaN of what is beyond its range
                rows_TKD = rows_TKD.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
                cache_PKSD = cache_PKSD.view(torch.uint8)  # torch can't index float8
            cache_PKSD[blocks, :, offsets] = rows_TKD.to(cache_PKSD.dtype)

    def paged_attention(
        self,
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
        check_paged_attention(
            q_THD,
            k_cache_PKSD,
            v_cache_PKSD,
            block_tables_BM,
            seq_lens_B,
            query_start_B1,
            out_THD,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        # Sequences with equally many queries and about equally many blocks go through together.
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        query_starts = query_start_B1.tolist()
        for row, seq_len in enumerate(seq_lens_B.tolist()):
            num_blocks = -(-seq_len // BLOCK_SIZE)
            padded = min(1 << (num_blocks - 1).bit_length(), block_tables_BM.shape[1])
            groups[query_starts[row + 1] - query_starts[row], padded].append(row)
        for (num_queries, num_blocks), rows in groups.items():
            index = torch.tensor(rows, device=q_THD.device)
            starts = query_start_B1[index].long()
            tokens_BQ = starts[:, None] + torch.arange(num_queries, device=q_THD.device)
            out_THD[tokens_BQ] = _attend(
                q_THD[tokens_BQ],
                k_cache_PKSD,
                v_cache_PKSD,
                block_tables_BM[index, :num_blocks],
                seq_lens_B[index].long(),
                scale,
                sliding_window,
                softcap,
            )

    def silu_and_mul(self, gate_up_TI2: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_TI2.chunk(2, dim=-1)
        return F.silu(gate) * up

    def keep_likely(
        self,
        scores_LV: torch.Tensor,
        temperature_L: torch.Tensor,
        min_p_L: torch.Tensor,
        top_k_L: torch.Tensor,
        top_p_L: torch.Tensor,
    ) -> torch.Tensor:
        return reference_sampling.keep_likely(scores_LV, temperature_L, min_p_L, top_k_L, top_p_L)

    def draw(
        self,
        scores_LV: torch.Tensor,
        temperature_L: torch.Tensor | None = None,
        keys_L2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return reference_sampling.draw(scores_LV, temperature_L, keys_L2)


def _dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A packed weight is expanded anew for every call: slow, and exact."""
    return weight.read().dequantize().to(dtype) if isinstance(weight, PackedWeight) else weight


def _attend(
    q_BQHD: torch.Tensor,
    k_cache_PKSD: torch.Tensor,
    v_cache_PKSD: torch.Tensor,
    tables_BM: torch.Tensor,
    seq_lens_B: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of B sequences with Q queries each; M blocks, so L = M × S keys. Returns [B, Q, H, D]."""
    num_seqs, num_queries, num_heads, head_dim = q_BQHD.shape
    num_kv_heads = k_cache_PKSD.shape[1]
    device = q_BQHD.device
    num_blocks_B = (seq_lens_B + BLOCK_SIZE - 1) // BLOCK_SIZE
    # Past a sequence's end its first block stands in: it is full, so it holds nothing but numbers.
    is_own_BM = torch.arange(tables_BM.shape[1], device=device) < num_blocks_B[:, None]
    tables_BM = torch.where(is_own_BM, tables_BM, tables_BM[:, :1]).long()
    runs_BKM = tables_BM[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=device)[:, None]
    # The last block's unused slots: an earlier owner may have left anything there, and 0 × NaN is NaN.
    positions_BS = (num_blocks_B[:, None] - 1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)
    unused_B, unused_S = (positions_BS >= seq_lens_B[:, None]).nonzero(as_tuple=True)
    unused_L = positions_BS[unused_B, unused_S]

    def gather(cache_PKSD: torch.Tensor) -> torch.Tensor:
        is_float8 = cache_PKSD.dtype == torch.float8_e4m3fn  # which torch can't index
        rows = (cache_PKSD.view(torch.uint8) if is_float8 else cache_PKSD).view(-1, BLOCK_SIZE * head_dim)
        runs = rows.index_select(0, runs_BKM.flatten()).view(cache_PKSD.dtype)
        keys_BKLD = runs.view(num_seqs, num_kv_heads, -1, head_dim).to(q_BQHD.dtype)
        keys_BKLD[unused_B, :, unused_L] = 0.0
        return keys_BKLD

    # A KV head's group of G query heads becomes G × Q queries of that one head.
    q_BKGQD = q_BQHD.transpose(1, 2).reshape(num_seqs, num_kv_heads, -1, head_dim)
    query_positions_BQ = (seq_lens_B - num_queries)[:, None] + torch.arange(num_queries, device=device)
    positions_L = torch.arange(tables_BM.shape[1] * BLOCK_SIZE, device=device)
    is_visible_BQL = positions_L <= query_positions_BQ[:, :, None]
    if sliding_window is not None:
        is_visible_BQL &= positions_L > query_positions_BQ[:, :, None] - sliding_window
    is_visible = is_visible_BQL[:, None].repeat(1, 1, num_heads // num_kv_heads, 1)
    keys, values = gather(k_cache_PKSD), gather(v_cache_PKSD)
    if softcap is None:
        out = F.scaled_dot_product_attention(q_BKGQD, keys, values, attn_mask=is_visible, scale=scale)
    else:
        scores = softcap * torch.tanh(q_BKGQD @ keys.transpose(-1, -2) * (scale / softcap))
        out = torch.where(is_visible, scores, -torch.inf).softmax(-1) @ values
    return out.reshape(num_seqs, num_heads, num_queries, head_dim).transpose(1, 2)
