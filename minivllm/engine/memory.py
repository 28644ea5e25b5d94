"""How many KV blocks fit, and the ledger that start-up prints about it."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minivllm.config import BLOCK_SIZE, EngineConfig, flag, format_size
from minivllm.engine.block_manager import blocks_for
from minivllm.engine.cgroup import cgroup_memory
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
    """Set aside for one step's activations and logits: measured on cuda, else estimated."""
    free: int
    """What the device has beyond that."""
    max_model_len: int
    """In tokens."""
    graphs: int = 0
    """Of CUDA graphs."""

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
            *([f"  graphs     {format_size(self.graphs):>11}"] if self.graphs else []),
            f"  free       {format_size(self.free):>11}",
            f"sequences at once: {full} that use all {length} tokens, paged or contiguous; of {short} tokens "
            f"each, {self.num_blocks // blocks_for(short)} paged, still {full} contiguous",
        ]


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    *,
    device: torch.device,
    kv_dtype: torch.dtype,
    weights: int,
    workspace_for: Callable[[int], int],
    graphs: int,
    max_num_batched_tokens: int,
    memory: tuple[int, int],
) -> MemoryLedger:
    """Decide the number of KV blocks and the longest sequence.

    Args:
        kv_dtype: of the KV cache.
        weights: bytes of the loaded weights; they are allocated already.
        workspace_for: bytes that a step of so many tokens takes beside that.
        graphs: bytes of CUDA graphs, which are recorded later.
        max_num_batched_tokens: of one step.
        memory: (free, total) bytes of the device, as :func:`device_memory` says.

    Raises:
        OutOfMemoryError: the pool can't hold one sequence of ``--max-model-len`` tokens, or the
            machine can't hold the pool; says which flag would have to change to what.
        ConfigError: ``--max-model-len`` is more than the model was made for.
    """
    if config.max_model_len is not None and config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len must be at most {model.max_position_embeddings}, the context this model was "
            f"made for, got {config.max_model_len}"
        )
    per_block = block_bytes(model, kv_dtype)
    workspace = workspace_for(max_num_batched_tokens)
    free, total = memory
    free -= graphs
    if device.type == "cuda":
        free -= int((1.0 - config.gpu_memory_utilization) * total)
    left = max(free - workspace, 0)
    num_tokens = config.max_model_len or BLOCK_SIZE
    needed = blocks_for(num_tokens) * per_block
    if left < needed:
        changes: list[dict[str, float]] = []  # each makes it fit by itself
        if left >= per_block:
            changes.append({"max_model_len": left // per_block * BLOCK_SIZE})
        step_tokens = most_tokens(workspace_for, free - needed, max_num_batched_tokens)
        if step_tokens:
            changes.append({"max_num_batched_tokens": step_tokens})
        missing = workspace + needed - free
        share = math.ceil((config.gpu_memory_utilization + missing / total) * 1000) / 1000
        if device.type == "cuda" and share <= 1.0:
            changes.append({"gpu_memory_utilization": share})
        if config.kv_cache_memory is not None or (device.type != "cuda" and needed > _DEFAULT_CPU_KV_MEMORY):
            for change in changes:
                is_shorter = "max_model_len" in change
                change["kv_cache_memory"] = left // per_block * per_block if is_shorter else needed
        raise OutOfMemoryError(
            f"{device} has {format_size(max(free, 0))} left beside the weights ({format_size(weights)}), too "
            f"little for a step's workspace ({format_size(workspace)}) and the KV cache of one sequence of "
            f"{num_tokens} tokens ({format_size(needed)}): {_advise(changes)}"
        )

    if config.kv_cache_memory is not None:
        kv_memory = config.kv_cache_memory
    elif device.type == "cuda":
        kv_memory = left
    else:
        kv_memory = min(_DEFAULT_CPU_KV_MEMORY, left)
    if kv_memory > left:
        raise OutOfMemoryError(
            f"--kv-cache-memory {kv_memory} ({format_size(kv_memory)}) doesn't fit: beside weights "
            f"({format_size(weights)}) and workspace ({format_size(workspace)}) {device} has "
            f"{format_size(left)} left; {_advise([{'kv_cache_memory': left // per_block * per_block}])}"
        )
    num_blocks = kv_memory // per_block
    fitting = num_blocks * BLOCK_SIZE
    if kv_memory < needed:
        changes = [{"max_model_len": fitting}] if fitting else []
        changes.append({"kv_cache_memory": needed})
        raise OutOfMemoryError(
            f"the KV cache of {format_size(kv_memory)} holds {fitting} tokens, fewer than one sequence of "
            f"{num_tokens}: {_advise(changes)}"
        )
    return MemoryLedger(
        device=str(device),
        weights=weights,
        num_blocks=num_blocks,
        block_bytes=per_block,
        workspace=workspace,
        free=left - num_blocks * per_block,
        max_model_len=config.max_model_len or min(model.max_position_embeddings, fitting),
        graphs=graphs,
    )


def _advise(changes: list[dict[str, float]]) -> str:
    """``set --this to 1 and --that to 2, or --other to 3``, for alternative changes of settings."""
    if not changes:
        return "it takes a larger machine, or a smaller model"
    return "set " + ", or ".join(
        " and ".join(f"{flag(name)} to {value}" for name, value in change.items()) for change in changes
    )


def most_tokens(workspace_for: Callable[[int], int], free: int, limit: int) -> int:
    """Fewer than ``limit`` tokens, the most whose step fits into ``free`` bytes; 0 if not even one does."""
    return bisect_right(range(1, limit), free, key=workspace_for)


def estimate_workspace(model: ModelConfig, dtype: torch.dtype, num_seqs: int, num_tokens: int) -> int:
    """Bytes of a step's activations in ``dtype`` and of the logits of up to ``num_seqs`` sequences.

    The widest activations that live at once in a layer, and the logits with the sampler's copies.
    """
    width = 4 * model.hidden_size + 3 * model.intermediate_size + 2 * model.num_heads * model.head_dim
    return num_tokens * width * dtype.itemsize + min(num_seqs, num_tokens) * model.vocab_size * 16


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes, of the container where there is one; what is loaded is not free any more."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    try:
        with open("/proc/meminfo") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        # MemAvailable: free memory, and what the system would give up for it, such as its page cache.
        free, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError):  # not Linux
        free = total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    container = cgroup_memory()
    return (free, total) if container is None else (min(free, container[0]), min(total, container[1]))
