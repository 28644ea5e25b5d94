"""The parts of a Llama layer that hold weights. Shapes as in ``minivllm_kernels.interface``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from minivllm_kernels import KernelBackend

from minivllm.models.config import RopeConfig


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's weights live, and what computes on them."""

    device: torch.device
    dtype: torch.dtype
    kernels: KernelBackend

    def empty(self, *shape: int) -> torch.Tensor:
        """An uninitialised weight."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Linear:
    """``x @ weight.T + bias``, several projections of the same input fused into one product.

    ``sizes`` are the projections' rows, top to bottom; :meth:`shard` is where a checkpoint's
    tensor for one of them goes.
    """

    def __init__(self, in_features: int, *sizes: int, bias: bool, placement: Placement) -> None:
        self.sizes = sizes
        self.kernels = placement.kernels
        self.weight = placement.empty(sum(sizes), in_features)
        self.bias = placement.empty(sum(sizes)) if bias else None

    def shard(self, index: int, name: str) -> torch.Tensor:
        """The rows of projection ``index`` in ``"weight"`` or ``"bias"``, as a view to copy into."""
        parameter: torch.Tensor = getattr(self, name)
        return parameter.narrow(0, sum(self.sizes[:index]), self.sizes[index])

    def __call__(self, x_TN: torch.Tensor) -> torch.Tensor:
        return self.kernels.linear(x_TN, self.weight, self.bias)


class RMSNorm:
    """RMSNorm of ``x + residual``; returns (normalised, ``x + residual``)."""

    def __init__(self, size: int, eps: float, placement: Placement) -> None:
        self.eps = eps
        self.kernels = placement.kernels
        self.weight = placement.empty(size)

    def __call__(
        self, x_TN: torch.Tensor, residual_TN: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kernels.rms_norm(x_TN, self.weight, self.eps, residual_TN)


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


class RotaryEmbedding:
    """Cosines and sines for a step's positions, computed once a step and passed to every layer."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self.frequencies = rope_frequencies(config, head_dim).to(device)

    def __call__(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns float32 (cos, sin), each [T, D], the second half repeating the first."""
        angles = positions_T.float()[:, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()
