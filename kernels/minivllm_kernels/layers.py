"""What decoder layers consist of. Shapes as in ``interface.py``."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TypeVar

import torch

from minivllm_kernels.packed import PackedWeight

T = TypeVar("T")

Weight = torch.Tensor | PackedWeight
"""A matrix [rows, N]: a tensor, or one of 4 or 8 bits."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerWeights:
    """Everything that one layer multiplies with; biases may be missing.

    Addresses are worked out when they are first needed: fill tensors in place, never replace them.
    """

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
        norm_shape = (self.sizes[0],)
        row = [
            address("attention_norm_N", self.attention_norm_N, norm_shape),
            address("mlp_norm_N", self.mlp_norm_N, norm_shape),
        ]
        for name in ("qkv", "o", "gate_up", "down"):
            weight = getattr(self, name)
            assert isinstance(weight, PackedWeight)
            row += *weight.arguments, address(f"{name}_bias", getattr(self, f"{name}_bias"), (weight.rows,))
        return row


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's share of the KV pool. Tensors are filled in place, never replaced."""

    k_PKSD: torch.Tensor
    v_PKSD: torch.Tensor

    @cached_property
    def layout(self) -> tuple[torch.Size, torch.dtype]:
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
        """A layer's, the same for all. Raises ValueError where one differs."""
        return _common([layer.sizes for layer in self.layers])

    @cached_property
    def addresses(self) -> array[int]:
        """What the C++ kernels take for packed ones: an array of ``Layer`` of layers.cpp."""
        return array("q", chain.from_iterable(layer.arguments for layer in self.layers))


@dataclass(frozen=True, eq=False)
class KVPool:
    """All layers' blocks, in order."""

    layers: Sequence[LayerCache]

    @cached_property
    def layout(self) -> tuple[torch.Size, torch.dtype]:
        """A layer's, the same for all. Raises ValueError where one differs."""
        return _common([cache.layout for cache in self.layers])

    @cached_property
    def addresses(self) -> array[int]:
        """What the C++ kernels take: each layer's two addresses."""
        shape, dtype = self.layout
        return array(
            "q",
            [
                address(name, getattr(cache, name), tuple(shape), dtype)
                for cache in self.layers
                for name in ("k_PKSD", "v_PKSD")
            ],
        )


def _common(values: list[T]) -> T:
    for value in values:
        if value != values[0]:
            raise ValueError(f"all layers must be as the first, {values[0]}, got {value}")
    return values[0]


def address(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> int:
    """Of a contiguous tensor, for C++, or 0 for none. Refuses another shape or dtype with a ValueError."""
    if tensor is None:
        return 0
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {shape}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()
