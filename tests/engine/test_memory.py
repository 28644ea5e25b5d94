"""Sizing the KV pool: the ledger adds up, and following an error's advice to the letter makes it fit."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.config import EngineConfig, ServerConfig, format_size, parse_size
from minivllm.engine import memory
from minivllm.engine.memory import MemoryLedger, block_bytes, estimate_workspace, plan_memory
from minivllm.engine.startup import build_engine
from minivllm.errors import ConfigError, MinivllmError, OutOfMemoryError
from minivllm.models.config import ModelConfig, RopeConfig
from minivllm.weights.files import resolve_model
from tests.tiny_model import write_tiny_model

MODEL = ModelConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    dtype="float32",
)
BLOCK = 3 * 2 * 2 * 16 * 16 * 4  # layers × (keys and values) × KV heads × head dim × tokens × float32


class Machine:
    """A device with so much memory; on "cuda" some of it is taken already."""

    graphs = 0

    def __init__(self, device: str, free: int, total: int) -> None:
        self.device = torch.device(device)
        self.memory = free, total

    def plan(self, config: EngineConfig) -> MemoryLedger:
        return plan_memory(
            config,
            MODEL,
            device=self.device,
            kv_dtype=torch.float32,
            weights=10**6,
            workspace_for=partial(estimate_workspace, MODEL, torch.float32, config.max_num_seqs),
            graphs=self.graphs,
            max_num_batched_tokens=config.max_num_batched_tokens or 64,
            memory=self.memory,
        )


def advice_in(message: str) -> list[dict[str, Any]]:
    """The alternatives in a message, as changes of a config: "set --a to 1 and --b to 2, or --c to 3"."""
    _, _, advice = message.rpartition("set --")
    alternatives = []
    for alternative in ("--" + advice).split(", or "):
        changes: dict[str, Any] = {}
        for part in alternative.split(" and "):
            match = re.fullmatch(r"--([a-z-]+) to ([0-9.]+)", part)
            assert match, f"not advice that can be followed: {part!r}"
            value = float(match[2]) if "." in match[2] else int(match[2])
            changes[match[1].replace("-", "_")] = value
        alternatives.append(changes)
    return alternatives


def test_block_bytes() -> None:
    assert block_bytes(MODEL, torch.float32) == BLOCK
    assert block_bytes(MODEL, torch.bfloat16) == BLOCK // 2


@settings(max_examples=300)
@given(
    device=st.sampled_from(["cpu", "cuda"]),
    free_blocks=st.integers(0, 300),
    taken_blocks=st.integers(0, 300),
    max_model_len=st.one_of(st.none(), st.integers(1, 2048)),
    default_blocks=st.integers(1, 200),
    kv_blocks=st.one_of(st.none(), st.floats(0.001, 300)),
    max_num_seqs=st.integers(1, 300),
    max_num_batched_tokens=st.integers(1, 600),
    utilization=st.floats(0.05, 1.0),
)
def test_a_plan_fits_or_says_what_would(
    device: str,
    free_blocks: int,
    taken_blocks: int,
    max_model_len: int | None,
    default_blocks: int,
    kv_blocks: float | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    utilization: float,
) -> None:
    free, total = free_blocks * BLOCK + 4321, (free_blocks + taken_blocks) * BLOCK + 9876
    config = EngineConfig(
        max_model_len=max_model_len,
        kv_cache_memory=None if kv_blocks is None else max(1, int(kv_blocks * BLOCK)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=utilization,
    )
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(device, free, total)
        patch.setattr(memory, "_DEFAULT_CPU_KV_MEMORY", default_blocks * BLOCK)
        try:
            ledger = machine.plan(config)
        except OutOfMemoryError as error:
            if "larger machine" in error.message:
                # Then neither the smallest step nor the whole GPU alone is enough.
                for changes in ({"max_num_batched_tokens": 1}, {"gpu_memory_utilization": 1.0}):
                    with pytest.raises(OutOfMemoryError):
                        machine.plan(dataclasses.replace(config, kv_cache_memory=None, **changes))
                return
            for changes in advice_in(error.message):
                machine.plan(dataclasses.replace(config, **changes))
            return
        available = free if device == "cpu" else free - (1 - utilization) * total
        kv_bytes = ledger.num_blocks * BLOCK
        assert ledger.free >= 0
        assert abs(kv_bytes + ledger.workspace + ledger.free - available) <= 1
        assert ledger.num_blocks * 16 >= ledger.max_model_len >= 1
        if max_model_len is None:
            assert ledger.max_model_len == min(2048, ledger.num_blocks * 16)
        else:
            assert ledger.max_model_len == max_model_len
        if config.kv_cache_memory is not None:
            assert kv_bytes <= config.kv_cache_memory < kv_bytes + BLOCK
        elif device == "cuda":
            assert ledger.free < BLOCK  # all of the share is used
        else:
            assert kv_bytes <= default_blocks * BLOCK


def test_cpu_default_is_a_gibibyte() -> None:
    ledger = Machine("cpu", 2**34, 2**35).plan(EngineConfig())
    assert ledger.num_blocks == 2**30 // BLOCK


def test_errors_name_the_flag_and_the_given_value() -> None:
    machine = Machine("cpu", 2**30, 2**31)
    with pytest.raises(ConfigError, match=r"--max-model-len must be at most 2048.*got 2049"):
        machine.plan(EngineConfig(max_model_len=2049))
    with pytest.raises(OutOfMemoryError, match=r"^--kv-cache-memory 2000000000 \(1\.86 GiB\) doesn't fit"):
        machine.plan(EngineConfig(kv_cache_memory=2 * 10**9))
    with pytest.raises(OutOfMemoryError, match=r"holds 32 tokens, fewer than one sequence of 33") as caught:
        machine.plan(EngineConfig(max_model_len=33, kv_cache_memory=3 * BLOCK - 1))
    assert advice_in(caught.value.message) == [{"max_model_len": 32}, {"kv_cache_memory": 3 * BLOCK}]
    with pytest.raises(OutOfMemoryError, match="holds 0 tokens") as caught:
        machine.plan(EngineConfig(kv_cache_memory=BLOCK - 1))
    assert advice_in(caught.value.message) == [{"kv_cache_memory": BLOCK}]


def test_advice_is_the_best_that_fits() -> None:
    """One token, block or token of a step more than advised doesn't fit."""
    machine = Machine("cpu", 2_000_000, 2**31)
    config = EngineConfig(max_model_len=2000, max_num_batched_tokens=80)
    with pytest.raises(OutOfMemoryError) as caught:
        machine.plan(config)
    shorter, smaller_steps = advice_in(caught.value.message)
    assert list(shorter) == ["max_model_len"]
    assert list(smaller_steps) == ["max_num_batched_tokens"]
    for changes in (shorter, smaller_steps):
        machine.plan(dataclasses.replace(config, **changes))
        ((name, value),) = changes.items()
        with pytest.raises(OutOfMemoryError):
            machine.plan(dataclasses.replace(config, **{name: value + 1}))


def test_a_fuller_gpu_is_advised_a_larger_share() -> None:
    machine = Machine("cuda", 60 * 10**6, 100 * 10**6)
    config = EngineConfig(gpu_memory_utilization=0.41, max_model_len=512)
    with pytest.raises(OutOfMemoryError, match=r"^cuda has 976\.56 KiB left beside") as caught:
        machine.plan(config)
    share = advice_in(caught.value.message)[-1]["gpu_memory_utilization"]
    assert 0.41 < share < 0.5
    machine.plan(dataclasses.replace(config, gpu_memory_utilization=share))
    with pytest.raises(OutOfMemoryError):
        machine.plan(dataclasses.replace(config, gpu_memory_utilization=share - 0.002))


def test_graphs_take_their_share() -> None:
    machine = Machine("cuda", 60 * 10**6, 100 * 10**6)
    without = machine.plan(EngineConfig())
    machine.graphs = 7 * BLOCK
    ledger = machine.plan(EngineConfig())
    assert ledger.num_blocks == without.num_blocks - 7
    assert (ledger.free, ledger.graphs) == (without.free, 7 * BLOCK)


def test_this_machine_has_memory() -> None:
    free, total = memory.device_memory(torch.device("cpu"))
    assert 2**20 < free <= total < 2**50


def test_ledger_lines() -> None:
    ledger = MemoryLedger(
        device="cpu",
        weights=3 * 2**30 // 2,
        num_blocks=1000,
        block_bytes=2**20,
        workspace=2**20,
        free=512,
        max_model_len=2048,
    )
    text = "\n".join(ledger.lines())
    assert ledger.num_seqs_contiguous == 1000 // 128 == 7
    for part in ("1.50 GiB", "1000.00 MiB", "1000 blocks", "16000 tokens", "1.00 MiB", "512 B"):
        assert part in text
    # 256 tokens each: 16 blocks; paged, 62 of them; contiguous, still 7
    assert re.search(r"7 that use all 2048 tokens.*256 tokens each, 62 paged, still 7 contiguous", text)


def test_ledger_of_one_token_sequences() -> None:
    ledger = MemoryLedger(
        device="cpu", weights=0, num_blocks=3, block_bytes=1, workspace=0, free=0, max_model_len=1
    )
    assert "of 1 tokens each, 3 paged, still 3 contiguous" in ledger.lines()[-1]


# Sizes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096),
        ("0", 0),
        ("1B", 1),
        ("1k", 1000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("64MB", 64_000_000),
        ("64 MB", 64_000_000),
        ("  64mb ", 64_000_000),
        ("2GiB", 2 * 2**30),
        ("2gi", 2 * 2**30),
        ("1.5G", 1_500_000_000),
        ("0.5KiB", 512),
        ("1TiB", 2**40),
    ],
)
def test_parse_size(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MB",
        "-1",
        "1.MB",
        ".5G",
        "1e9",
        "1 000",
        "12XB",
        "1GBB",
        "0x10",
        "nan",
        "inf",
        "64MB extra",
        "8388608TiB",
    ],
)
def test_parse_size_refuses_and_repeats_what_it_got(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert repr(text) in caught.value.message


def test_a_size_without_end_is_refused_in_few_words() -> None:
    with pytest.raises(ConfigError, match="below 8 EiB") as caught:
        parse_size("9" * 400 + "GiB")
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20, "1.00 MiB"),
        (3 * 2**30 // 2, "1.50 GiB"),
        (5000 * 2**30, "5000.00 GiB"),
    ],
)
def test_format_size(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


@given(st.integers(0, 2**60))
def test_a_formatted_size_parses_back(num_bytes: int) -> None:
    parsed = parse_size(format_size(num_bytes))
    unit = 1024 ** min(3, int(math.log(max(num_bytes, 1), 1024) + 1e-9))
    assert abs(parsed - num_bytes) <= 0.006 * unit + 1e-9 * num_bytes


# Settings


@pytest.mark.parametrize(
    ("settings_", "flag", "given_value"),
    [
        ({"max_model_len": 0}, "--max-model-len", "0"),
        ({"max_num_seqs": -3}, "--max-num-seqs", "-3"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens", "0"),
        ({"num_parallel": 0}, "--num-parallel", "0"),
        ({"kv_cache_memory": 0}, "--kv-cache-memory", "0"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization", "0.0"),
        ({"gpu_memory_utilization": 1.01}, "--gpu-memory-utilization", "1.01"),
        ({"gpu_memory_utilization": math.nan}, "--gpu-memory-utilization", "nan"),
        ({"device": "tpu"}, "--device", "'tpu'"),
        ({"dtype": "float64"}, "--dtype", "'float64'"),
        ({"load_format": "pickle"}, "--load-format", "'pickle'"),
        ({"quantization": "awq"}, "--quantization", "'awq'"),
        ({"kv_allocation": "slab"}, "--kv-allocation", "'slab'"),
        ({"num_parallel": 4}, "--num-parallel", "4 needs --scheduler sequential"),
        ({"scheduler": "fifo"}, "--scheduler", "'fifo'"),
        ({"kv_allocation": "contiguous", "enable_prefix_caching": True}, "--enable-prefix-caching", ""),
    ],
    ids=str,
)
def test_engine_config_names_flag_and_value(settings_: dict[str, Any], flag: str, given_value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings_)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MinivllmError)
    assert caught.value.message.startswith(f"{flag} ")
    assert given_value in caught.value.message


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({}, True),
        ({"enable_prefix_caching": True}, True),
        ({"enable_prefix_caching": False}, False),
        ({"kv_allocation": "contiguous"}, False),
        ({"kv_allocation": "contiguous", "enable_prefix_caching": False}, False),
    ],
    ids=str,
)
def test_prefix_cache_is_on_when_paged(settings_: dict[str, Any], expected: bool) -> None:
    assert EngineConfig(**settings_).use_prefix_cache is expected


@pytest.mark.parametrize(
    ("settings_", "flag", "given_value"),
    [
        ({"port": -1}, "--port", "-1"),
        ({"port": 65536}, "--port", "65536"),
        ({"max_body_size": 0}, "--max-body-size", "0"),
        ({"max_header_count": 0}, "--max-header-count", "0"),
        ({"shutdown_timeout": -0.5}, "--shutdown-timeout", "-0.5"),
    ],
    ids=str,
)
def test_server_config_names_flag_and_value(settings_: dict[str, Any], flag: str, given_value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**settings_)
    assert caught.value.message.startswith(f"{flag} ")
    assert given_value in caught.value.message


def test_limits_are_allowed() -> None:
    EngineConfig(max_model_len=1, max_num_seqs=1, max_num_batched_tokens=1, kv_cache_memory=1)
    EngineConfig(num_parallel=1, scheduler="sequential")
    EngineConfig(gpu_memory_utilization=1.0)
    ServerConfig(port=0, max_body_size=1, shutdown_timeout=0)
    ServerConfig(port=65535)


def test_an_fp8_cache_needs_a_gpu_that_has_it(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path)
    config = EngineConfig(model=model, load_format="dummy", device="cpu", kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match=r"fp8 needs .* capability 8\.9 .*this is cpu"):
        build_engine(config, resolve_model(model, load_format="dummy"))
