"""One step's work as the flat tensors that the model takes.

Shape legend:
    T tokens of this step, B sequences, M blocks in the longest table, B1 = B + 1,
    L sequences whose logits are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from minivllm.config import BLOCK_SIZE
from minivllm.engine.scheduler import ScheduledBatch


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """A step's tensors, all sequences laid end to end. Integer tensors on the runner's device."""

    input_ids_T: torch.Tensor
    """int64: the tokens."""
    positions_T: torch.Tensor
    """int64: each token's index in its sequence."""
    slots_T: torch.Tensor
    """int64: where each token's keys and values go: block id × BLOCK_SIZE + offset in the block."""
    block_tables_BM: torch.Tensor
    """int32: each sequence's blocks, padded with 0."""
    seq_lens_B: torch.Tensor
    """int32: tokens in the cache once this step's are written."""
    query_start_B1: torch.Tensor
    """int32: where each sequence's tokens begin in T; the last entry is T."""
    logits_index_L: torch.Tensor
    """int64: which of the T tokens a next token is sampled from."""

    @classmethod
    def build(cls, batch: ScheduledBatch, device: torch.device) -> FlatBatch:
        """Lay the batch out. Costs Python per sequence, numpy per token."""
        items = batch.requests
        num_tokens = np.array([item.num_tokens for item in items], dtype=np.int64)
        computed = np.array([item.request.num_computed_tokens for item in items], dtype=np.int64)
        query_start = np.zeros(len(items) + 1, dtype=np.int32)
        np.cumsum(num_tokens, out=query_start[1:])

        input_ids: list[int] = []
        max_blocks = max(len(item.request.block_table) for item in items)
        tables = np.zeros((len(items), max_blocks), dtype=np.int32)
        for row, item in enumerate(items):
            request = item.request
            start = request.num_computed_tokens
            input_ids += request.token_ids[start : start + item.num_tokens]
            tables[row, : len(request.block_table)] = request.block_table

        sequence_of_T = np.repeat(np.arange(len(items)), num_tokens)
        positions = np.arange(len(input_ids)) - query_start[sequence_of_T] + computed[sequence_of_T]
        blocks = tables[sequence_of_T, positions // BLOCK_SIZE].astype(np.int64)
        sampled = np.array([item.is_sampled for item in items], dtype=bool)

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device)

        return cls(
            input_ids_T=tensor(np.array(input_ids, dtype=np.int64)),
            positions_T=tensor(positions),
            slots_T=tensor(blocks * BLOCK_SIZE + positions % BLOCK_SIZE),
            block_tables_BM=tensor(tables),
            seq_lens_B=tensor((computed + num_tokens).astype(np.int32)),
            query_start_B1=tensor(query_start),
            logits_index_L=tensor(query_start[1:][sampled].astype(np.int64) - 1),
        )
