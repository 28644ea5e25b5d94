"""Steps that are run before the KV cache is sized: to compile kernels, and to see what memory they take."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from minivllm.engine.batch import FlatBatch
from minivllm.engine.block_manager import blocks_for
from minivllm.engine.decode_graphs import CudaRecorder, DecodeGraphs
from minivllm.engine.runner import empty_pool
from minivllm.engine.sampler import sample
from minivllm.models.llama import Llama
from minivllm.request import MAX_LOGPROBS, Request, SamplingParams


def compile_kernels(model: Llama, *, kv_dtype: torch.dtype, num_tokens: int, max_model_len: int) -> None:
    """Run prompts and late chunks of all lengths up to ``num_tokens`` tokens.

    A kernel is compiled for each way of splitting its work when it is first used, which takes seconds:
    better now than in somebody's answer.
    """
    device = model.placement.device
    pool = empty_pool(model, num_blocks=1, kv_dtype=kv_dtype)
    for length in {min(2**power, num_tokens) for power in range(num_tokens.bit_length() + 1)}:
        for seq_len in {length, max(length, max_model_len)}:
            with torch.inference_mode():
                model(one_chunk(length, seq_len, device), pool)


def one_chunk(num_tokens: int, seq_len: int, device: torch.device) -> FlatBatch:
    """The last ``num_tokens`` tokens of a sequence of ``seq_len``, all in the pool's block 0."""
    return replace(
        longest_batch(num_tokens, 1, device),
        block_tables_BM=torch.zeros(1, blocks_for(seq_len), dtype=torch.int32, device=device),
        seq_lens_B=torch.tensor([seq_len], dtype=torch.int32, device=device),
    )


def measure_step(model: Llama, *, kv_dtype: torch.dtype, num_tokens: int, num_seqs: int) -> int:
    """Bytes that a step at its limits takes beside weights and KV cache, from mixed batch to sampling.

    One prompt takes all of the ``num_tokens`` that ``num_seqs - 1`` decodes leave, and every request asks
    for all that the sampler has.

    Raises:
        torch.OutOfMemoryError: the device doesn't have that much.
    """
    device, vocab_size = model.placement.device, model.config.vocab_size
    num_seqs = min(num_seqs, num_tokens)
    flat = longest_batch(num_tokens, num_seqs, device)
    sampling = SamplingParams(top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, logprobs=MAX_LOGPROBS)
    requests = [
        Request(str(row), [row % vocab_size], sampling, seed=row, max_total_tokens=2)
        for row in range(num_seqs)
    ]
    pool = empty_pool(model, num_blocks=1, kv_dtype=kv_dtype)
    before = _free_memory(device)
    with torch.inference_mode():
        sample(model(flat, pool), requests, frozenset(), model.kernels).fetch()
    taken = before - torch.cuda.mem_get_info(device)[0]  # with what torch's allocator keeps for later
    _free_memory(device)
    return max(taken, 0)


def measure_graphs(model: Llama, *, kv_dtype: torch.dtype, max_model_len: int, sizes: list[int]) -> int:
    """Bytes that recording decode graphs of these sizes will take, from the two largest of them.

    Raises:
        torch.OutOfMemoryError: the device doesn't have that much.
    """
    device = model.placement.device
    pool = empty_pool(model, num_blocks=1, kv_dtype=kv_dtype)
    before = _free_memory(device)
    taken: list[int] = []
    graphs = []  # alive until all are measured
    record = CudaRecorder()
    for size in sorted(sizes, reverse=True)[:2]:
        graphs.append(
            DecodeGraphs(
                model, pool, padding_block=0, max_model_len=max_model_len, sizes=[size], record=record
            )
        )
        taken.append(max(before - sum(taken) - torch.cuda.mem_get_info(device)[0], 0))
    del graphs
    _free_memory(device)
    # The first is the largest, in whose memory the others run; each adds what a recording itself takes.
    return sum(taken[:1]) + max(len(sizes) - 1, 0) * sum(taken[1:])


def longest_batch(num_tokens: int, num_seqs: int, device: torch.device) -> FlatBatch:
    """A step of ``num_tokens`` tokens, a prompt and ``num_seqs - 1`` decodes, all in the pool's block 0."""
    num_prompt = num_tokens - num_seqs + 1
    decodes = FlatBatch.padding(num_tokens, blocks_for(num_prompt), 0, device)
    last_of_each = torch.arange(num_seqs, device=device) + num_prompt - 1
    seq_lens = decodes.seq_lens_B[:num_seqs].clone()
    seq_lens[0] = num_prompt
    query_start = torch.cat((torch.zeros_like(last_of_each[:1]), last_of_each + 1)).to(torch.int32)
    return replace(
        decodes,
        block_tables_BM=decodes.block_tables_BM[:num_seqs],
        seq_lens_B=seq_lens,
        query_start_B1=query_start,
        logits_index_L=last_of_each,
    )


def _free_memory(device: torch.device) -> int:
    """Bytes, once torch has given back what it keeps for later."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
