"""Decode steps as CUDA graphs: one launch replays the model, instead of hundreds that Python makes.

A graph is a recording: it runs the same kernels on the same addresses. So there is one for each of a
few batch sizes, with inputs of its own, and a batch of another size is padded to the next larger one.
Padding rows are sequences of one token, in a block that belongs to nobody. Recorded is the model from
token ids to logits; sampling depends on the requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from minivllm_kernels import KVPool

from minivllm.engine.batch import FlatBatch
from minivllm.engine.block_manager import blocks_for
from minivllm.engine.scheduler import ScheduledBatch
from minivllm.models.llama import Llama

Compute = Callable[[], torch.Tensor]
Record = Callable[[Compute], Compute]
"""Makes a replay of a computation: when called, it leaves the result where the recording left it."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that are recorded: close together where a row more or less shows in the time."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 8193, 64)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class CudaRecorder:
    """Records CUDA graphs. They share one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self.memory_pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """Record ``compute``, which must neither wait for the device nor allocate outside of torch."""
        compute()  # whatever happens only once, such as compiling a kernel, can't be recorded
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory_pool):
            result = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


class DecodeGraphs:
    """A model's decode step for batches of up to ``sizes[-1]`` sequences.

    Args:
        padding_block: in ``pool``, and no sequence's.
        max_model_len: most tokens in a sequence.
        sizes: ascending batch sizes.
        record: on CUDA a :class:`CudaRecorder`.
    """

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        *,
        padding_block: int,
        max_model_len: int,
        sizes: list[int],
        record: Record,
    ) -> None:
        from tqdm import tqdm

        self.sizes = sizes
        self._graphs: dict[int, _DecodeGraph] = {}
        device, max_blocks = model.placement.device, blocks_for(max_model_len)
        padding_row = FlatBatch.padding(1, max_blocks, padding_block, device)
        # The largest first: the others then find room in its memory.
        largest_first = sorted(sizes, reverse=True)
        for size in tqdm(largest_first, "decode graphs", unit="graph", leave=False, disable=None):
            inputs = FlatBatch.padding(size, max_blocks, padding_block, device)
            replay = record(partial(model, inputs, pool))
            self._graphs[size] = _DecodeGraph(inputs, padding_row, replay)

    def can_run(self, batch: ScheduledBatch) -> bool:
        """Whether these are decodes alone, and no more than the largest graph has room for."""
        num_seqs = len(batch.requests)
        return (
            num_seqs == batch.num_tokens
            and num_seqs <= self.sizes[-1]
            and all(item.is_sampled for item in batch.requests)  # not a prompt's chunk of one token
        )

    def __call__(self, flat: FlatBatch) -> torch.Tensor:
        """Logits [B, V] of a batch that :meth:`can_run`; the next call overwrites them."""
        num_seqs = len(flat.seq_lens_B)
        size = self.sizes[bisect_left(self.sizes, num_seqs)]
        return self._graphs[size](flat)[:num_seqs]


class _DecodeGraph:
    """One batch size's recording, its inputs, and how many of their rows hold sequences."""

    def __init__(self, inputs: FlatBatch, padding_row: FlatBatch, replay: Compute) -> None:
        self._inputs, self._padding_row, self._replay = inputs, padding_row, replay
        self._num_seqs = 0

    def __call__(self, flat: FlatBatch) -> torch.Tensor:
        num_seqs, num_before = len(flat.seq_lens_B), self._num_seqs
        for name in ("input_ids_T", "positions_T", "slots_T", "seq_lens_B", "block_tables_BM"):
            rows, values = getattr(self._inputs, name), getattr(flat, name)
            if num_seqs < num_before:
                rows[num_seqs:num_before] = getattr(self._padding_row, name)
            if values.ndim == 2:  # what is right of a sequence's own blocks is never followed
                rows = rows[:, : values.shape[1]]
            rows[:num_seqs] = values
        self._num_seqs = num_seqs
        return self._replay()
