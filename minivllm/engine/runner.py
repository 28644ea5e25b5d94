"""The one place where a scheduled batch meets a model."""

from __future__ import annotations

from typing import Protocol

import torch

from minivllm.config import BLOCK_SIZE
from minivllm.engine.batch import FlatBatch
from minivllm.engine.sampler import sample
from minivllm.engine.scheduler import SampledToken, ScheduledBatch
from minivllm.models.attention import LayerCache
from minivllm.models.llama import Llama


class Runner(Protocol):
    """Executes a step. Real, simulated or fake: the scheduler can't tell."""

    def execute(self, batch: ScheduledBatch) -> list[SampledToken | None]:
        """Run the step; one entry for each request, None where it isn't sampled yet."""


class TorchRunner:
    """Runs a :class:`Llama` over a KV pool, on CPU or CUDA.

    Args:
        model: with its weights loaded.
        num_blocks: of the KV pool, which is allocated here.
        kv_dtype: of the KV pool.
        eos_token_ids: masked while a request has fewer than ``min_tokens`` tokens.
    """

    def __init__(
        self, model: Llama, *, num_blocks: int, kv_dtype: torch.dtype, eos_token_ids: frozenset[int]
    ) -> None:
        self.model = model
        self.eos_token_ids = eos_token_ids
        self.device = model.placement.device
        config = model.config
        # One tensor, so that it is one allocation; empty, so that memory is taken as blocks are used.
        pool = torch.empty(
            config.num_layers,
            2,
            num_blocks,
            config.num_kv_heads,
            BLOCK_SIZE,
            config.head_dim,
            dtype=kv_dtype,
            device=self.device,
        )
        self.caches = [LayerCache(layer[0], layer[1]) for layer in pool]

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> list[SampledToken | None]:
        """Flat tensors → logits → tokens. Mutates the KV pool, nothing else."""
        logits_LV = self.model(FlatBatch.build(batch, self.device), self.caches)
        chosen = sample(logits_LV, batch.sampled_requests(), self.eos_token_ids, self.model.kernels)
        sampled = iter(chosen.fetch())
        return [next(sampled) if item.is_sampled else None for item in batch.requests]
