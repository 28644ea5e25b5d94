"""The parts of a Llama layer that hold weights. Shapes as in ``minivllm_kernels.interface``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from minivllm_kernels import KernelBackend, PackedRows, PackedWeight, Weight

from minivllm.models.config import RopeConfig

WeightSlot = torch.Tensor | PackedRows
"""Where a checkpoint's tensor is copied to, with ``shape`` and ``copy_``."""


def _never_packed(name: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's weights live, in what form, and what computes on them."""

    device: torch.device
    dtype: torch.dtype
    kernels: KernelBackend
    bits_of: Callable[[str], int | None] = _never_packed
    """4 or 8 for a matrix (by its Hugging Face name) that is kept packed, None for one in ``dtype``."""

    def empty(self, *shape: int) -> torch.Tensor:
        """An uninitialised weight in ``dtype``."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def matrix(self, names: Iterable[str], rows: int, columns: int) -> Weight:
        """An uninitialised matrix for the tensors ``names``, below each other: packed if all of them are."""
        bits = [self.bits_of(name) for name in names]
        known = [value for value in bits if value is not None]
        if len(known) < len(bits):
            return self.empty(rows, columns)
        return PackedWeight(rows, columns, max(known))


class Linear:
    """Weight and bias of ``x @ weight.T + bias``: several projections of the same input in one product.

    Args:
        projections: Hugging Face name, without ``.weight``, to number of rows; top to bottom.
    """

    def __init__(
        self, projections: dict[str, int], in_features: int, *, bias: bool, placement: Placement
    ) -> None:
        self.projections = projections
        rows = sum(projections.values())
        self.weight = placement.matrix((f"{name}.weight" for name in projections), rows, in_features)
        self.bias = placement.empty(rows) if bias else None

    def weight_slots(self) -> dict[str, WeightSlot]:
        """Where each projection's tensors go, by their names."""
        slots: dict[str, WeightSlot] = {}
        start = 0
        for name, rows in self.projections.items():
            slots[f"{name}.weight"] = matrix_slot(self.weight, start, rows)
            if self.bias is not None:
                slots[f"{name}.bias"] = self.bias[start : start + rows]
            start += rows
        return slots


class NormedLinear(Linear):
    """:class:`Linear` of an input that is normalised first, and the norm's weight."""

    def __init__(
        self,
        norm: str,
        projections: dict[str, int],
        in_features: int,
        *,
        bias: bool,
        placement: Placement,
    ) -> None:
        super().__init__(projections, in_features, bias=bias, placement=placement)
        self.norm = norm
        self.norm_weight = placement.empty(in_features)

    def weight_slots(self) -> dict[str, WeightSlot]:
        """The norm's too."""
        return {f"{self.norm}.weight": self.norm_weight, **super().weight_slots()}


def matrix_slot(weight: Weight, start: int, rows: int) -> WeightSlot:
    """Rows [start, start + rows) of a matrix, to copy a tensor into."""
    return (
        PackedRows(weight, start, rows) if isinstance(weight, PackedWeight) else weight[start : start + rows]
    )


def slot_bytes(slot: WeightSlot) -> int:
    """Memory behind a slot."""
    return slot.num_bytes if isinstance(slot, PackedRows) else slot.numel() * slot.element_size()


def rope_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angle per position of each rotated pair: float32 [head_dim / 2].

    Linear scaling is Chen et al. 2023; llama3 scaling is Llama 3.1's (Dubey et al. 2024): long
    wavelengths are divided by ``factor``, short ones kept, and those between get a smooth mix.
    """
    frequencies = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "factors":
        return frequencies / torch.tensor(config.factors)
    if config.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        original = config.original_max_position_embeddings
        smooth = (original / wavelengths - config.low_freq_factor) / (
            config.high_freq_factor - config.low_freq_factor
        )
        smooth = smooth.clamp(0.0, 1.0)
        return (1 - smooth) * frequencies / config.factor + smooth * frequencies
    return frequencies
