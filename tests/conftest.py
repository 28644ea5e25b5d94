"""Fixtures that several folders share: the embedded model, loaded once, and transformers as its oracle."""

from __future__ import annotations

import asyncio
import os
import time

from minivllm.openmp import spin_briefly

spin_briefly()  # before torch is imported

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: it then runs on the CPU

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
from minivllm_kernels import available_backends

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.startup import load_model, make_engine
from minivllm.models.llama import Llama
from minivllm.request import SamplingParams
from minivllm.weights.files import ModelFiles, resolve_model

# How long an example takes, or finding one, is the machine's affair.
hypothesis.settings.register_profile(
    "minivllm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("minivllm")


def pytest_report_header() -> str:
    """Which kernels this machine can test."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = "; ".join(f"on {device}: {', '.join(available_backends(device))}" for device in devices)
    missing = "" if torch.cuda.is_available() else ", nothing on cuda: no GPU"
    if "triton" not in found:
        missing += ", nothing of triton: not installed"
    elif not torch.cuda.is_available():
        missing += ", triton by its interpreter alone"
    return f"kernels {found}{missing}"


@pytest.fixture(scope="session")
def embedded_files() -> ModelFiles:
    """The embedded model's files."""
    return resolve_model(None)


@pytest.fixture(scope="session")
def embedded_model(embedded_files: ModelFiles) -> Llama:
    """The embedded model with its weights, in float32 on the CPU; every engine may share it."""
    return load_model(EngineConfig(device="cpu", quantization="none"), embedded_files)


@pytest.fixture
def make_embedded_engine(embedded_files: ModelFiles, embedded_model: Llama) -> Callable[..., Engine]:
    """An engine around the embedded model, with any settings."""

    def make(**settings: Any) -> Engine:
        return make_engine(
            EngineConfig(device="cpu", quantization="none", **settings), embedded_files, embedded_model
        )

    return make


@dataclass
class Oracle:
    """What transformers would have generated, given that all before it was the same."""

    model: Any
    near_ties: set[tuple[int, ...]] = field(default_factory=set)
    """Sequences whose last token was the oracle's second choice, within 1e-4 of its first."""
    _checked: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)

    def check(self, prompt: list[int], output: list[int]) -> None:
        """Assert that each output token is the oracle's greedy choice after all before it.

        One forward over prompt and output: if every token is the choice after its prefix, then
        greedy decoding gives this very output.
        """
        key = (len(prompt), (*prompt, *output))
        if key in self._checked:
            return
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        for index, token in enumerate(output):
            (first, second), (best, runner_up) = (values.tolist() for values in logits[index].topk(2))
            if token == best:
                continue
            is_near_tie = token == runner_up and first - second <= 1e-4
            assert is_near_tie, (
                f"token {index} of the answer to a prompt of {len(prompt)} tokens is {token}; transformers "
                f"says {best}, by {first - logits[index, token]:.6f}"
            )
            self.near_ties.add((*prompt, *output[: index + 1]))
        self._checked.add(key)


@pytest.fixture(scope="session")
def oracle(embedded_files: ModelFiles) -> Oracle:
    """The embedded model as transformers itself loads and runs it."""
    from transformers import AutoModelForCausalLM

    path = embedded_files.path
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return Oracle(model.eval())


async def until(condition: Callable[[], object]) -> None:
    """Wait for what must come, while others run; the test fails if it doesn't."""
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end, "waited 180 s in vain"
        await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], object]) -> None:
    """:func:`until`, for those without an event loop."""
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end, "waited 180 s in vain"
        time.sleep(0.01)


GREEDY_64 = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)


def run_all(engine: Engine, prompts: list[list[int]], sampling: SamplingParams) -> list[list[int]]:
    """Add all prompts at once, step until all have ended, and return their tokens.

    Checks the engine's integrity after every step.
    """
    outputs: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, sampling)
        outputs[str(index)] = []
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            outputs[event.request_id] += event.new_token_ids
        engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    return list(outputs.values())
