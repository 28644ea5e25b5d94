"""What the tests on a GPU run on: small models in both 16-bit dtypes, with heads of 64 and of 128.

They are skipped where torch finds no GPU. ``MINIVLLM_TEST_DEVICE=cpu`` runs them on the CPU's plain torch
kernels instead, slowly: that checks the tests themselves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.startup import load_model, make_engine
from minivllm.models.llama import Llama
from minivllm.weights.files import ModelFiles, resolve_model
from tests.gpu.oracle import Oracle, make_oracle

DEVICE = os.environ.get("MINIVLLM_TEST_DEVICE", "cuda")
CASES = [(64, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16), (128, torch.float16)]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skips everything below this folder where there is none."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no NVIDIA GPU; MINIVLLM_TEST_DEVICE=cpu runs these tests on the CPU")


@dataclass
class Case:
    """A model as we load it, and as transformers does."""

    oracle: Oracle
    model: Llama
    files: ModelFiles
    config: dict[str, Any]

    def make_engine(self, **settings: Any) -> Engine:
        """An engine around the model, by default with room for about 2,000 tokens."""
        defaults = {"kv_cache_memory": 128 * self.block_bytes, "max_model_len": 512}
        config = EngineConfig(**self.config | defaults | settings)
        return make_engine(config, self.files, self.model)

    @property
    def block_bytes(self) -> int:
        """Keys and values of 16 tokens."""
        config = self.model.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * 16 * 2


@pytest.fixture(scope="session", params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest, gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Case:
    head_dim, dtype = request.param
    oracle = make_oracle(head_dim, dtype, DEVICE, tmp_path_factory.mktemp("checkpoint"))
    settings = {"model": str(oracle.folder), "device": DEVICE, "dtype": str(dtype).removeprefix("torch.")}
    files = resolve_model(settings["model"])
    return Case(oracle, load_model(EngineConfig(**settings), files), files, settings)  # type: ignore[arg-type]


@pytest.fixture
def rng() -> np.random.Generator:
    """Other numbers in each run. A failure shows the seed; MINIVLLM_TEST_SEED repeats it."""
    seed = int(os.environ.get("MINIVLLM_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
    print(f"MINIVLLM_TEST_SEED={seed} repeats this")
    return np.random.default_rng(seed)
