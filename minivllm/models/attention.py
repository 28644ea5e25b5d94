"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minivllm.engine.batch import FlatBatch
from minivllm.models.config import ModelConfig
from minivllm.models.layers import Linear, NormedLinear, Placement


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's share of the KV pool; both tensors [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]."""

    k_PKSD: torch.Tensor
    v_PKSD: torch.Tensor


class Attention:
    """Norm; Q, K and V in one product; rotate; write K and V to the cache; attend to what is there."""

    def __init__(self, prefix: str, config: ModelConfig, placement: Placement) -> None:
        self.kernels = placement.kernels
        self.scale, self.sliding_window = config.head_dim**-0.5, config.sliding_window
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        name, bias = f"{prefix}.self_attn", config.attention_bias
        self.qkv_proj = NormedLinear(
            f"{prefix}.input_layernorm",
            {f"{name}.q_proj": q_size, f"{name}.k_proj": kv_size, f"{name}.v_proj": kv_size},
            config.hidden_size,
            eps=config.rms_norm_eps,
            bias=bias,
            placement=placement,
        )
        self.o_proj = Linear({f"{name}.o_proj": config.hidden_size}, q_size, bias=bias, placement=placement)

    def __call__(
        self,
        x_TN: torch.Tensor,
        residual_TN: torch.Tensor | None,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        batch: FlatBatch,
        cache: LayerCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (output [T, N], ``x + residual``); ``cache`` is mutated at ``batch.slots_T``."""
        qkv, o = self.qkv_proj, self.o_proj
        return self.kernels.attention_layer(
            x_TN,
            residual_TN,
            qkv.norm_weight,
            qkv.eps,
            qkv.weight,
            qkv.bias,
            o.weight,
            o.bias,
            cos_TD,
            sin_TD,
            cache.k_PKSD,
            cache.v_PKSD,
            batch.slots_T,
            batch.block_tables_BM,
            batch.seq_lens_B,
            batch.query_start_B1,
            scale=self.scale,
            sliding_window=self.sliding_window,
        )
