"""One step's work as the flat tensors that the model takes.

Shape legend:
    T tokens of this step, B sequences, M blocks in the longest table, B1 = B + 1,
    L sequences whose logits are needed.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from minivllm.config import BLOCK_SIZE
from minivllm.engine.scheduler import ScheduledBatch
from minivllm.engine.transfer import to_device
from minivllm.request import PENDING_TOKEN, Request


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """A step's tensors, all sequences laid end to end. Integer tensors on the runner's device."""

    input_ids_T: torch.Tensor
    """int64. ``-1 - r`` stands for a token still on the device: row ``r`` of the last step's samples."""
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
    def build(
        cls, batch: ScheduledBatch, device: torch.device, sampled_rows: Mapping[Request, int] | None = None
    ) -> FlatBatch:
        """Lay the batch out. Python's lists, not numpy: for a few tokens its calls cost more.

        Args:
            device: where the tensors go; the copies may still be under way when this returns.
            sampled_rows: where the last step's samples are, for sequences that end in PENDING_TOKEN.
        """
        input_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        seq_lens: list[int] = []
        query_start = [0]
        logits_index: list[int] = []
        block_tables: list[array[int]] = []
        for item in batch.requests:
            request, start, end = item.request, item.start, item.start + item.num_tokens
            table = request.block_table
            input_ids += request.token_ids[start:end]
            for position in range(start, end):
                positions.append(position)
                slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            block_tables.append(table)
            seq_lens.append(end)
            query_start.append(len(positions))
            if item.is_sampled:
                logits_index.append(len(positions) - 1)
            if input_ids[-1] == PENDING_TOKEN:
                input_ids[-1] = -1 - (sampled_rows or {})[request]
        row_size = 4 * max(map(len, block_tables))
        rows = bytearray().join([table.tobytes().ljust(row_size, b"\0") for table in block_tables])
        tables = np.frombuffer(rows, dtype=np.int32).reshape(len(block_tables), -1)
        return cls(
            input_ids_T=to_device(np.array(input_ids, dtype=np.int64), device),
            positions_T=to_device(np.array(positions, dtype=np.int64), device),
            slots_T=to_device(np.array(slots, dtype=np.int64), device),
            block_tables_BM=to_device(tables, device),
            seq_lens_B=to_device(np.array(seq_lens, dtype=np.int32), device),
            query_start_B1=to_device(np.array(query_start, dtype=np.int32), device),
            logits_index_L=to_device(np.array(logits_index, dtype=np.int64), device),
        )

    @classmethod
    def padding(cls, num_seqs: int, num_blocks: int, block: int, device: torch.device) -> FlatBatch:
        """Decodes of sequences of one token, which all lie in ``block``; tables [num_seqs, num_blocks]."""
        int64 = partial(torch.zeros, num_seqs, dtype=torch.int64, device=device)
        return cls(
            input_ids_T=int64(),
            positions_T=int64(),
            slots_T=int64() + block * BLOCK_SIZE,
            block_tables_BM=torch.full((num_seqs, num_blocks), block, dtype=torch.int32, device=device),
            seq_lens_B=torch.ones(num_seqs, dtype=torch.int32, device=device),
            query_start_B1=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
            logits_index_L=torch.arange(num_seqs, device=device),
        )

    def with_sampled(self, sampled_L: torch.Tensor) -> FlatBatch:
        """The batch with the last step's samples, int64 [L], in the places of its pending tokens."""
        if len(sampled_L) == 0:
            return self
        rows_T = (-1 - self.input_ids_T).clamp_(min=0)
        return replace(
            self, input_ids_T=torch.where(self.input_ids_T < 0, sampled_L[rows_T], self.input_ids_T)
        )
