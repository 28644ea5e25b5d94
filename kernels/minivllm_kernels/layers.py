"""What a decoder layer consists of. Shapes as in ``interface.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minivllm_kernels.packed import PackedWeight

Weight = torch.Tensor | PackedWeight
"""A matrix [rows, N]: a tensor, or one of 4 or 8 bits."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Everything that one layer multiplies with; biases may be missing."""

    attention_norm_N: torch.Tensor
    qkv: Weight
    """[A * D, N]: queries, keys and values, in one product."""
    qkv_bias: torch.Tensor | None
    o: Weight
    """[N, H * D]"""
    o_bias: torch.Tensor | None
    mlp_norm_N: torch.Tensor
    gate_up: Weight
    """[2I, N]"""
    gate_up_bias: torch.Tensor | None
    down: Weight
    """[N, I]"""
    down_bias: torch.Tensor | None

    @property
    def is_packed(self) -> bool:
        """Whether all matrices have 4 or 8 bits."""
        return all(isinstance(weight, PackedWeight) for weight in (self.qkv, self.o, self.gate_up, self.down))


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's share of the KV pool."""

    k_PKSD: torch.Tensor
    v_PKSD: torch.Tensor
