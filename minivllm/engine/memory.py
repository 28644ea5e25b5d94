"""How many KV blocks fit, and the ledger that start-up prints about it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from minivllm.config import BLOCK_SIZE, EngineConfig, format_size
from minivllm.engine.block_manager import blocks_for
from minivllm.errors import ConfigError, OutOfMemoryError
from minivllm.models.config import ModelConfig

_DEFAULT_CPU_KV_MEMORY = 2**30


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * BLOCK_SIZE * dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLedger:
    """Where the memory goes, all in bytes unless said otherwise."""

    device: str
    weights: int
    num_blocks: int
    block_bytes: int
    workspace: int
    """Set aside for one step's activations and logits (estimated from the step's token budget)."""
    free: int
    """What the device has beyond that."""
    max_model_len: int
    """In tokens."""

    @property
    def num_seqs_contiguous(self) -> int:
        """Sequences that fit at once when each gets a run of ``max_model_len`` tokens."""
        return self.num_blocks // blocks_for(self.max_model_len)

    def lines(self) -> list[str]:
        """The ledger as start-up prints it."""
        tokens, length = self.num_blocks * BLOCK_SIZE, self.max_model_len
        full = self.num_seqs_contiguous
        short = max(length // 8, 1)
        return [
            f"memory on {self.device}:",
            f"  weights    {format_size(self.weights):>11}",
            f"  KV cache   {format_size(self.num_blocks * self.block_bytes):>11}"
            f"   {self.num_blocks} blocks of {BLOCK_SIZE} tokens = {tokens} tokens",
            f"  workspace  {format_size(self.workspace):>11}",
            f"  free       {format_size(self.free):>11}",
            f"sequences at once: {full} that use all {length} tokens, paged or contiguous; of {short} tokens "
            f"each, {self.num_blocks // blocks_for(short)} paged, still {full} contiguous",
        ]


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: int,
    max_num_batched_tokens: int,
) -> MemoryLedger:
    """Decide the number of KV blocks and the longest sequence.

    Args:
        weights: bytes that the loaded weights take; on CUDA they are allocated already.
        max_num_batched_tokens: of one step; sets the workspace.

    Raises:
        OutOfMemoryError: the pool can't hold one sequence of ``--max-model-len`` tokens, or the
            machine can't hold the pool; says which flag would have to change to what.
        ConfigError: ``--max-model-len`` is more than the model was made for.
    """
    per_block = block_bytes(model, dtype)
    workspace = _workspace(model, dtype, max_num_batched_tokens, config.max_num_seqs)
    available = _available(device, config.gpu_memory_utilization)
    # On CUDA the weights are counted as used by the driver already; on the CPU likewise by the system.
    left = available - workspace
    if config.kv_cache_memory is not None:
        kv_memory = config.kv_cache_memory
    elif device.type == "cuda":
        kv_memory = left
    else:
        kv_memory = min(_DEFAULT_CPU_KV_MEMORY, left)
    if kv_memory > left:
        most = max(left, 0)
        raise OutOfMemoryError(
            f"the KV cache of {format_size(kv_memory)} doesn't fit: beside weights ({format_size(weights)}) "
            f"and workspace ({format_size(workspace)}) {device} has {format_size(most)} left; "
            f"set --kv-cache-memory to at most {most}"
        )
    num_blocks = kv_memory // per_block if kv_memory > 0 else 0
    max_model_len = _max_model_len(config, model, num_blocks, per_block)
    return MemoryLedger(
        device=str(device),
        weights=weights,
        num_blocks=num_blocks,
        block_bytes=per_block,
        workspace=workspace,
        free=left - num_blocks * per_block,
        max_model_len=max_model_len,
    )


def _max_model_len(config: EngineConfig, model: ModelConfig, num_blocks: int, per_block: int) -> int:
    fitting = num_blocks * BLOCK_SIZE
    if config.max_model_len is None:
        if fitting == 0:
            raise OutOfMemoryError(
                f"the KV cache has no room for a single block: set --kv-cache-memory to at least {per_block}"
            )
        return min(model.max_position_embeddings, fitting)
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len must be at most {model.max_position_embeddings}, the context this model was "
            f"made for, got {config.max_model_len}"
        )
    if config.max_model_len > fitting:
        raise OutOfMemoryError(
            f"the KV cache holds {fitting} tokens, fewer than one sequence of --max-model-len "
            f"{config.max_model_len}: lower --max-model-len to {fitting}, or raise --kv-cache-memory to "
            f"{blocks_for(config.max_model_len) * per_block}"
        )
    return config.max_model_len


def _workspace(model: ModelConfig, dtype: torch.dtype, num_tokens: int, num_seqs: int) -> int:
    # The widest activations that live at once in a layer, and the logits with the sampler's copies.
    width = 4 * model.hidden_size + 3 * model.intermediate_size + 2 * model.num_heads * model.head_dim
    return num_tokens * width * dtype.itemsize + min(num_seqs, num_tokens) * model.vocab_size * 16


def _available(device: torch.device, utilization: float) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1.0 - utilization) * total)
    try:
        # Free memory and what the system would give up for it: the page cache holds no one back.
        with open("/proc/meminfo") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
