"""From a configuration to a running engine: files → weights → KV blocks, each stage timed and told."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from minivllm_kernels import get_backend

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.memory import plan_memory
from minivllm.engine.runner import TorchRunner
from minivllm.errors import ConfigError
from minivllm.models.layers import Placement
from minivllm.models.llama import Llama
from minivllm.request import EngineInfo
from minivllm.weights.files import ModelFiles
from minivllm.weights.loader import check_and_iterate

logger = logging.getLogger(__name__)

_DEFAULT_BATCHED_TOKENS = {"cpu": 512, "cuda": 4096}


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log that a stage of start-up is done, and how long it took."""
    start = time.monotonic()
    yield
    logger.info("%s: %.2f s", name, time.monotonic() - start)


def build_engine(config: EngineConfig, files: ModelFiles) -> Engine:
    """Load a model's weights and put an engine around it.

    Raises:
        StartupError: a file, a flag or the memory is not as it must be; the message says what to do.
    """
    with stage("weights loaded"):
        model = load_model(config, files)
    with stage("KV cache allocated"):
        return make_engine(config, files, model)


def load_model(config: EngineConfig, files: ModelFiles) -> Llama:
    """A model with its weights, on the device and in the dtype that ``config`` asks for."""
    from tqdm import tqdm

    device = _device(config.device)
    placement = Placement(device, _dtype(config.dtype, files, device), get_backend("auto"))
    model = Llama(files.config, placement)
    slots = model.weight_slots()
    expected = {name: tuple(slot.shape) for name, slot in slots.items()}
    weights = check_and_iterate(files, expected)
    # disable=None: no bar where standard error isn't a terminal.
    for name, tensor in tqdm(weights, "weights", total=len(slots), unit="tensor", leave=False, disable=None):
        slots[name].copy_(tensor)
    return model


def make_engine(config: EngineConfig, files: ModelFiles, model: Llama) -> Engine:
    """Size and allocate the KV pool, print the memory ledger, and build the engine."""
    device, dtype = model.embedding.device, model.embedding.dtype
    max_num_batched_tokens = config.max_num_batched_tokens or _DEFAULT_BATCHED_TOKENS[device.type]
    ledger = plan_memory(
        config,
        files.config,
        device=device,
        dtype=dtype,
        weights=model.num_weight_bytes,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    for line in ledger.lines():
        logger.info("%s", line)
    if config.max_model_len is None and ledger.max_model_len < files.config.max_position_embeddings:
        logger.warning(
            "sequences are limited to %d tokens, all that the KV cache holds, though the model could do %d: "
            "--kv-cache-memory makes room for more",
            ledger.max_model_len,
            files.config.max_position_embeddings,
        )
    eos_token_ids = frozenset(files.config.eos_token_ids)
    return Engine(
        config,
        TorchRunner(model, num_blocks=ledger.num_blocks, eos_token_ids=eos_token_ids),
        EngineInfo(ledger.max_model_len, files.config.vocab_size),
        num_blocks=ledger.num_blocks,
        max_num_batched_tokens=max_num_batched_tokens,
        eos_token_ids=eos_token_ids,
    )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no usable NVIDIA GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(name: str, files: ModelFiles, device: torch.device) -> torch.dtype:
    if name == "auto":
        # CPUs without matrix units for 16-bit floats are several times slower with them.
        name = "float32" if device.type == "cpu" else files.config.dtype
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--dtype {name} is not a dtype")
    return dtype
