"""The one place where a scheduled batch meets a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from minivllm_kernels import KVPool, LayerCache

from minivllm.config import BLOCK_SIZE
from minivllm.engine.batch import FlatBatch
from minivllm.engine.decode_graphs import DecodeGraphs
from minivllm.engine.grammar import Grammars
from minivllm.engine.huge_pages import empty_in_huge_pages, touch
from minivllm.engine.prompt_logprobs import score_prompts
from minivllm.engine.sampler import sample
from minivllm.engine.scheduler import SampledToken, ScheduledBatch
from minivllm.models.llama import Llama
from minivllm.request import Request

PendingTokens = Callable[[], list[SampledToken | None]]
"""Waits for a step's tokens: one entry for each request of the batch, None where it isn't sampled yet."""


class Runner(Protocol):
    """Executes a step. Real, simulated or fake: the scheduler can't tell."""

    runs_ahead: bool
    """Whether a step may be started before the tokens of the one before it are known to the host."""

    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        """Start the step. Where a sequence ends in :data:`PENDING_TOKEN`, the last step's token goes in.

        Raises:
            MemoryError: a smaller step may still fit. Nothing has happened then that another try could see.
        """


class TorchRunner:
    """Runs a :class:`Llama` over a KV pool, on CPU or CUDA.

    Args:
        model: with its weights loaded.
        num_blocks: of the KV pool, which is allocated here.
        kv_dtype: of the KV pool.
        eos_token_ids: masked while a request has fewer than ``min_tokens`` tokens.
        grammars: of the engine; None where no request has one.
    """

    def __init__(
        self,
        model: Llama,
        *,
        num_blocks: int,
        kv_dtype: torch.dtype,
        eos_token_ids: frozenset[int],
        grammars: Grammars | None = None,
    ) -> None:
        self.model = model
        self.grammars = grammars
        self.runs_ahead = model.placement.device.type == "cuda"
        self.graphs: DecodeGraphs | None = None
        self.eos_token_ids = eos_token_ids
        self.padding_block = num_blocks  # one more than sequences get
        self.pool = empty_pool(model, num_blocks=num_blocks + 1, kv_dtype=kv_dtype)
        self._last_sampled_L: torch.Tensor | None = None
        self._last_rows: dict[Request, int] = {}

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        """Flat tensors → logits → tokens. Mutates the KV pool, nothing else.

        Raises:
            MemoryError: the GPU has too little left for a step of this size.
        """
        try:
            return self._execute(batch)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error).split(".")[0]) from error

    def _execute(self, batch: ScheduledBatch) -> PendingTokens:
        requests = batch.sampled_requests()
        pending_mask = None if self.grammars is None else self.grammars.start_mask(requests)
        try:
            logits_LV = self._logits(batch)
        finally:  # another try must not find threads at work on the same grammars
            mask, errors = (None, {}) if pending_mask is None else pending_mask.wait()
        sampled = sample(logits_LV, requests, self.eos_token_ids, self.model.kernels, mask)
        if self.runs_ahead:
            self._last_sampled_L = sampled.tokens_L
            self._last_rows = {request: row for row, request in enumerate(requests)}

        def fetch() -> list[SampledToken | None]:
            tokens = sampled.fetch()
            for row, error in errors.items():
                tokens[row].error = error
            rest = iter(tokens)
            return [next(rest) if item.is_sampled else None for item in batch.requests]

        return fetch

    def _logits(self, batch: ScheduledBatch) -> torch.Tensor:
        flat = FlatBatch.build(batch, self.model.placement.device, self._last_rows)
        if self._last_sampled_L is not None:
            flat = flat.with_sampled(self._last_sampled_L)
        if self.graphs is not None and self.graphs.can_run(batch):
            return self.graphs(flat)
        hidden_TN = self.model.hidden(flat, self.pool)
        logits_LV = self.model.logits(hidden_TN, flat.logits_index_L)
        score_prompts(self.model, hidden_TN, batch)
        return logits_LV

    def touch_pool(self) -> Iterator[int]:
        """Take the KV pool's memory from the system, a little with each step; nothing to do on a GPU."""
        if self.model.placement.device.type == "cpu":
            for cache in self.pool.layers:
                for tensor in (cache.k_PKSD, cache.v_PKSD):
                    yield from touch(tensor)


def empty_pool(model: Llama, *, num_blocks: int, kv_dtype: torch.dtype) -> KVPool:
    """A KV pool for all layers. Its memory isn't touched yet: see :meth:`TorchRunner.touch_pool`."""
    config = model.config
    device = model.placement.device
    shape = config.num_layers, 2, num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim
    if device.type == "cpu":
        memory = empty_in_huge_pages(*shape, dtype=kv_dtype)
    else:
        memory = torch.empty(shape, dtype=kv_dtype, device=device)
    return KVPool([LayerCache(layer[0], layer[1]) for layer in memory])
