"""What decoder layers consist of. Shapes as in ``interface.py``."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch

from minivllm_kernels.packed import PackedWeight

Weight = torch.Tensor | PackedWeight
"""A matrix [rows, N]: a tensor, or one of 4 or 8 bits."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Everything that one layer multiplies with; biases may be missing. Tensors stay where they are."""

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

    @cached_property
    def is_packed(self) -> bool:
        """Whether all matrices have 4 or 8 bits."""
        return all(isinstance(weight, PackedWeight) for weight in (self.qkv, self.o, self.gate_up, self.down))

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, A * D, H * D, I. Raises ValueError where the matrices don't fit together."""
        (qkv_rows, hidden_size), inner_size = self.qkv.shape, self.down.shape[1]
        for name, shape in (
            ("o", (hidden_size, self.o.shape[1])),
            ("gate_up", (2 * inner_size, hidden_size)),
            ("down", (hidden_size, inner_size)),
        ):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(getattr(self, name).shape)}")
        return hidden_size, qkv_rows, self.o.shape[1], inner_size

    @cached_property
    def arguments(self) -> list[int]:
        """What the C++ kernels take for it, if it is packed: ``Layer`` of layers.cpp."""
        hidden_size = self.sizes[0]
        row = [
            address(self.attention_norm_N, hidden_size),
            address(self.mlp_norm_N, hidden_size),
        ]
        for weight, bias in (
            (self.qkv, self.qkv_bias),
            (self.o, self.o_bias),
            (self.gate_up, self.gate_up_bias),
            (self.down, self.down_bias),
        ):
            assert isinstance(weight, PackedWeight)
            row += *weight.arguments, address(bias, weight.rows)
        return row


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's share of the KV pool. Tensors stay where they are."""

    k_PKSD: torch.Tensor
    v_PKSD: torch.Tensor

    @cached_property
    def kind(self) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype. Raises ValueError unless both tensors have them."""
        k_PKSD, v_PKSD = self.k_PKSD, self.v_PKSD
        if v_PKSD.shape != k_PKSD.shape or v_PKSD.dtype != k_PKSD.dtype:
            raise ValueError(
                f"v_PKSD must be as k_PKSD, {k_PKSD.dtype} {tuple(k_PKSD.shape)}, "
                f"got {v_PKSD.dtype} {tuple(v_PKSD.shape)}"
            )
        return k_PKSD.shape, k_PKSD.dtype


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """All layers' weights, in order."""

    layers: Sequence[LayerWeights]

    @cached_property
    def is_packed(self) -> bool:
        """Whether all matrices of all layers have 4 or 8 bits."""
        return all(layer.is_packed for layer in self.layers)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """Every layer's. Raises ValueError where one differs."""
        first = self.layers[0].sizes
        for layer in self.layers:
            if layer.sizes != first:
                raise ValueError(f"all layers must be as the first, {first}, got {layer.sizes}")
        return first

    @cached_property
    def table(self) -> array[int]:
        """What the C++ kernels take for packed ones: an array of ``Layer`` of layers.cpp."""
        return array("q", chain.from_iterable(layer.arguments for layer in self.layers))


@dataclass(frozen=True, eq=False)
class KVPool:
    """All layers' blocks, in order."""

    layers: Sequence[LayerCache]

    @cached_property
    def kind(self) -> tuple[torch.Size, torch.dtype]:
        """Every layer's. Raises ValueError where one differs."""
        first = self.layers[0].kind
        for cache in self.layers:
            if cache.kind != first:
                raise ValueError(f"all layers must be as the first, {first}, got {cache.kind}")
        return first

    @cached_property
    def table(self) -> array[int]:
        """What the C++ kernels take: each layer's two addresses."""
        return array(
            "q", [tensor.data_ptr() for cache in self.layers for tensor in (cache.k_PKSD, cache.v_PKSD)]
        )


def address(vector: torch.Tensor | None, size: int) -> int:
    """Of a float32 vector, or 0 for none."""
    if vector is None:
        return 0
    if vector.dtype != torch.float32 or vector.shape != (size,):
        raise ValueError(f"a vector must be float32 [{size}], got {vector.dtype} {tuple(vector.shape)}")
    return vector.data_ptr()
