"""From a configuration to a running engine: files → weights → KV blocks, each stage timed and told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from minivllm_kernels import KernelBackend, PackedRows, available_backends, get_backend

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.memory import plan_memory
from minivllm.engine.runner import TorchRunner
from minivllm.errors import ConfigError
from minivllm.models.layers import Placement
from minivllm.models.llama import Llama
from minivllm.request import EngineInfo
from minivllm.weights.files import ModelFiles
from minivllm.weights.loader import check_and_iterate, stored_bits

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
    """A model with its weights, on the device and in the form that ``config`` asks for."""
    from tqdm import tqdm

    device = _device(config.device)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    dtype = _dtype(config.dtype, files, device)
    kernels = _kernels(device, dtype)
    model = Llama(files.config, Placement(device, dtype, kernels, _bits_of(config, files, kernels)))
    slots = model.weight_slots()
    expected = {name: tuple(slot.shape) for name, slot in slots.items()}
    packed = frozenset(name for name, slot in slots.items() if isinstance(slot, PackedRows))
    weights = check_and_iterate(files, expected, packed)
    # disable=None: no bar where standard error isn't a terminal.
    for name, tensor in tqdm(weights, "weights", total=len(slots), unit="tensor", leave=False, disable=None):
        slots[name].copy_(tensor)
    return model


def make_engine(config: EngineConfig, files: ModelFiles, model: Llama) -> Engine:
    """Size and allocate the KV pool, print the memory ledger, and build the engine."""
    device, dtype = model.placement.device, model.placement.dtype
    kv_dtype = _kv_dtype(config.kv_cache_dtype, model)
    max_num_batched_tokens = config.max_num_batched_tokens or _DEFAULT_BATCHED_TOKENS[device.type]
    ledger = plan_memory(
        config,
        files.config,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
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
        TorchRunner(model, num_blocks=ledger.num_blocks, kv_dtype=kv_dtype, eos_token_ids=eos_token_ids),
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


def _kernels(device: torch.device, dtype: torch.dtype) -> KernelBackend:
    """The fastest kernels for device and dtype; logs which, and what their lack costs."""
    if device.type == "cuda":
        kernels = get_backend("auto", "cuda")
        if kernels.name == "triton":
            logger.info("kernels: Triton on %s", torch.cuda.get_device_name(device))
        else:
            logger.warning(
                "kernels: plain torch, because triton isn't installed: several times slower; install triton"
            )
        return kernels
    if dtype != torch.float32:
        return get_backend("reference")
    kernels = get_backend("auto")
    if kernels.name == "reference":
        logger.warning(
            "kernels: plain torch, because the C++ ones aren't built: several times slower, and quantised "
            "weights are expanded to float32; with a C++ compiler present, install minivllm again"
        )
    else:
        logger.info(
            "kernels: C++ for %s (of %s), %d threads",
            kernels.name,
            ", ".join(name for name in available_backends() if name not in ("reference", "triton")),
            torch.get_num_threads(),
        )
    return kernels


def _bits_of(config: EngineConfig, files: ModelFiles, kernels: KernelBackend) -> Callable[[str], int | None]:
    """How many bits each matrix is kept in, None for all of ``--dtype``."""
    can_pack = kernels.name not in ("reference", "triton")
    if config.quantization == "int8":
        if not can_pack:
            raise ConfigError(
                "--quantization int8 needs --device cpu, --dtype float32 and the C++ kernels; "
                "use auto or none"
            )
        return lambda name: 8
    if config.quantization == "auto" and can_pack:
        return lambda name: stored_bits(files, name)
    return lambda name: None


def _kv_dtype(name: str, model: Llama) -> torch.dtype:
    if name == "auto":
        return torch.float16 if model.is_packed else model.placement.dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype
