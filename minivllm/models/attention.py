"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minivllm.engine.batch import FlatBatch
from minivllm.models.config import ModelConfig
from minivllm.models.layers import Linear, Placement


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's share of the KV pool; both tensors [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]."""

    k_PKSD: torch.Tensor
    v_PKSD: torch.Tensor


class Attention:
    """Q, K and V in one product; rotate; write K and V to the cache; attend to what is there."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        self.kernels = placement.kernels
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = config.attention_bias
        self.qkv_proj = Linear(config.hidden_size, q_size, kv_size, kv_size, bias=bias, placement=placement)
        self.o_proj = Linear(q_size, config.hidden_size, bias=bias, placement=placement)

    def __call__(
        self,
        x_TN: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        batch: FlatBatch,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Returns [T, N]; ``cache`` is mutated at ``batch.slots_T``."""
        heads = self.qkv_proj(x_TN).view(x_TN.shape[0], -1, self.head_dim)
        q_THD, k_TKD, v_TKD = torch.split(
            heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1
        )
        q_THD, k_TKD = self.kernels.rope(q_THD, k_TKD, cos_TD, sin_TD)
        self.kernels.write_kv(k_TKD, v_TKD, cache.k_PKSD, cache.v_PKSD, batch.slots_T)
        out_THD = torch.empty_like(q_THD)
        self.kernels.paged_attention(
            q_THD,
            cache.k_PKSD,
            cache.v_PKSD,
            batch.block_tables_BM,
            batch.seq_lens_B,
            batch.query_start_B1,
            scale=self.head_dim**-0.5,
            out_THD=out_THD,
        )
        return self.o_proj(out_THD.flatten(1))
