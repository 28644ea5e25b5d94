"""From a configuration to a running engine: files → weights → KV blocks, each stage timed and told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from minivllm_kernels import KernelBackend, PackedRows, get_backend
from minivllm_kernels.cpu import instruction_sets

from minivllm.config import EngineConfig, format_size
from minivllm.engine.batch import FlatBatch
from minivllm.engine.decode_graphs import CudaRecorder, DecodeGraphs, graph_sizes
from minivllm.engine.engine import Engine
from minivllm.engine.grammar import Grammars
from minivllm.engine.memory import device_memory, estimate_workspace, most_tokens, plan_memory
from minivllm.engine.runner import TorchRunner
from minivllm.engine.steps import Sink
from minivllm.errors import ConfigError, ModelLoadError, OutOfMemoryError
from minivllm.models.layers import Placement
from minivllm.models.llama import Llama
from minivllm.request import EngineInfo
from minivllm.tokenizer.load import load_tokenizer
from minivllm.tracing.writer import TraceWriter
from minivllm.weights.files import ModelFiles
from minivllm.weights.loader import check_and_iterate, stored_bits

logger = logging.getLogger(__name__)

MIN_CAPABILITY = 8, 0
"""Ampere: the first cards that compute in bfloat16."""
DEFAULT_BATCHED_TOKENS = {"cpu": 512, "cuda": 4096}


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log that a stage of start-up is done, and how long it took."""
    start = time.monotonic()
    yield
    logger.info("%s: %.2f s", name, time.monotonic() - start)


def build_engine(config: EngineConfig, files: ModelFiles, sinks: Sequence[Sink] = ()) -> Engine:
    """Load a model's weights and put an engine around it, which tells ``sinks`` of its steps.

    Raises:
        StartupError: a file, a flag or the memory is not as it must be; the message says what to do.
    """
    # Weights take a while: a file that can't be written had better be known before.
    trace = None if config.trace is None else TraceWriter(config.trace)
    with stage("weights loaded"):
        model = load_model(config, files)
    with stage("KV cache allocated"):
        return make_engine(config, files, model, trace, sinks)


def load_model(config: EngineConfig, files: ModelFiles) -> Llama:
    """A model with its weights, on the device and in the form that ``config`` asks for."""
    from tqdm import tqdm

    device = _device(config.device)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    dtype = _dtype(config.dtype, files, device)
    kernels = _kernels(device, dtype)
    model = _allocate(files, Placement(device, dtype, kernels, _bits_of(config, files, kernels)))
    slots = model.weight_slots()
    expected = {name: tuple(slot.shape) for name, slot in slots.items()}
    packed = frozenset(name for name, slot in slots.items() if isinstance(slot, PackedRows))
    weights = check_and_iterate(files, expected, packed)
    # disable=None: no bar where standard error isn't a terminal.
    for name, tensor in tqdm(weights, "weights", total=len(slots), unit="tensor", leave=False, disable=None):
        slots[name].copy_(tensor)
    return model


def make_engine(
    config: EngineConfig,
    files: ModelFiles,
    model: Llama,
    trace: TraceWriter | None = None,
    sinks: Sequence[Sink] = (),
) -> Engine:
    """Size and allocate the KV pool, print the memory ledger, build the engine.

    ``trace`` and ``sinks`` are told of its steps.
    """
    device = model.placement.device
    kv_dtype = _kv_dtype(config.kv_cache_dtype, model)
    max_num_batched_tokens = config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[device.type]
    has_graphs = device.type == "cuda" and model.kernels.is_capturable and not config.enforce_eager
    sizes = graph_sizes(config.max_num_seqs) if has_graphs else []
    workspace_for, graphs = _step_memory(config, model, kv_dtype, max_num_batched_tokens, sizes)
    ledger = plan_memory(
        config,
        files.config,
        device=device,
        kv_dtype=kv_dtype,
        weights=model.num_weight_bytes,
        workspace_for=workspace_for,
        graphs=graphs,
        max_num_batched_tokens=max_num_batched_tokens,
        memory=device_memory(device),
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
    if not eos_token_ids and files.kind != "dummy":
        logger.warning(
            "%s names no end-of-turn token (eos_token_id): answers end at their stop strings or their limits",
            files.name,
        )
    grammars = Grammars(
        partial(load_tokenizer, files), vocab_size=files.config.vocab_size, eos_token_ids=eos_token_ids
    )
    runner = TorchRunner(
        model,
        num_blocks=ledger.num_blocks,
        kv_dtype=kv_dtype,
        eos_token_ids=eos_token_ids,
        grammars=grammars,
    )
    _check_weights(runner, files)
    if sizes:
        with stage("decode graphs recorded"):
            runner.graphs = DecodeGraphs(
                model,
                runner.pool,
                padding_block=runner.padding_block,
                max_model_len=ledger.max_model_len,
                sizes=sizes,
                record=CudaRecorder(),
            )
    if trace is not None:
        header = {
            "model": files.name,
            "device": _device_name(device),
            "kv_blocks": ledger.num_blocks,
            "max_model_len": ledger.max_model_len,
            "max_num_batched_tokens": max_num_batched_tokens,
        }
        trace.begin(config, header, origin=time.monotonic(), runs_ahead=runner.runs_ahead)
    return Engine(
        config,
        runner,
        EngineInfo(ledger.max_model_len, files.config.vocab_size),
        num_blocks=ledger.num_blocks,
        max_num_batched_tokens=max_num_batched_tokens,
        eos_token_ids=eos_token_ids,
        grammars=grammars,
        sinks=sinks if trace is None else (trace, *sinks),
        idle_work=runner.touch_pool(),
    )


@torch.inference_mode()
def _check_weights(runner: TorchRunner, files: ModelFiles) -> None:
    """Compute one token: damaged weights mostly make NaN of everything, and answers of that look empty."""
    placement = runner.model.placement
    token = FlatBatch.padding(1, 1, runner.padding_block, placement.device)
    logits_LV = runner.model(token, runner.pool)
    if not logits_LV.isfinite().all():
        raise ModelLoadError(
            f"{files.path}: the weights give logits that aren't finite numbers: the file is damaged, or its "
            f"numbers don't fit into --dtype {str(placement.dtype).removeprefix('torch.')}"
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _allocate(files: ModelFiles, placement: Placement) -> Llama:
    """The model with room for its weights."""
    try:
        return Llama(files.config, placement)
    except torch.OutOfMemoryError:
        on_no_device = replace(placement, device=torch.device("meta"))
        needed = Llama(files.config, on_no_device).num_weight_bytes
        dtype = str(placement.dtype).removeprefix("torch.")
        total = device_memory(placement.device)[1]
        advice = "set --dtype to bfloat16, or take" if placement.dtype == torch.float32 else "take"
        raise OutOfMemoryError(
            f"the weights take {format_size(needed)} in {dtype}, and {placement.device} has "
            f"{format_size(total)}, of which others use some: {advice} a larger GPU or a smaller model"
        ) from None


def _step_memory(
    config: EngineConfig, model: Llama, kv_dtype: torch.dtype, num_tokens: int, sizes: list[int]
) -> tuple[Callable[[int], int], int]:
    """Bytes that a step takes, by its tokens, and those that decode graphs of ``sizes`` take."""
    device, dtype = model.placement.device, model.placement.dtype
    estimate = partial(estimate_workspace, model.config, dtype, config.max_num_seqs)
    if device.type != "cuda":
        return estimate, 0
    from minivllm.engine.profiling import compile_kernels, measure_graphs, measure_step

    longest = config.max_model_len or model.config.max_position_embeddings
    try:
        with stage("kernels compiled"):
            compile_kernels(model, kv_dtype=kv_dtype, num_tokens=num_tokens, max_model_len=longest)
        with stage("a step's memory measured"):
            more = measure_step(
                model, kv_dtype=kv_dtype, num_tokens=num_tokens, num_seqs=config.max_num_seqs
            ) - estimate(num_tokens)
            graphs = measure_graphs(model, kv_dtype=kv_dtype, max_model_len=longest, sizes=sizes)
    except torch.OutOfMemoryError:
        free, _ = device_memory(device)
        fitting = min(most_tokens(estimate, free, num_tokens), num_tokens // 2)
        raise OutOfMemoryError(
            f"{device} has {format_size(free)} left beside the weights "
            f"({format_size(model.num_weight_bytes)}), too little for a step of {num_tokens} tokens and "
            f"{config.max_num_seqs} sequences: set --max-num-batched-tokens to {max(fitting, 1)}, or "
            "--max-num-seqs to less"
        ) from None
    return (lambda tokens: estimate(tokens) + more), graphs


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    fault = "torch finds no usable NVIDIA GPU here"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability >= MIN_CAPABILITY:
            return torch.device("cuda")
        fault = "this NVIDIA GPU has compute capability {}.{}, and {}.{} is the least that the kernels know"
        fault = fault.format(*capability, *MIN_CAPABILITY)
        if name == "auto":
            logger.warning("%s: the CPU is used", fault)
    if name == "cuda":
        raise ConfigError(f"--device cuda: {fault}; use --device cpu")
    return torch.device("cpu")


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
            ", ".join(instruction_sets()),
            torch.get_num_threads(),
        )
    return kernels


def _bits_of(config: EngineConfig, files: ModelFiles, kernels: KernelBackend) -> Callable[[str], int | None]:
    """How many bits each matrix is kept in, None for all of ``--dtype``."""
    if config.quantization == "int8":
        if not kernels.keeps_packed:
            raise ConfigError(
                "--quantization int8 needs --device cpu, --dtype float32 and the C++ kernels; "
                "use auto or none"
            )
        return lambda name: 8
    if config.quantization == "auto" and kernels.keeps_packed:
        return lambda name: stored_bits(files, name)
    return lambda name: None


def _kv_dtype(name: str, model: Llama) -> torch.dtype:
    if name == "auto":
        return torch.float16 if model.is_packed else model.placement.dtype
    if name == "fp8":
        device = model.placement.device
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            raise ConfigError(
                "--kv-cache-dtype fp8 needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper), "
                f"and this is {device}; use auto"
            )
        return torch.float8_e4m3fn
    dtype: torch.dtype = getattr(torch, name)
    return dtype
