"""Engines around a model so small that a test can have several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.runner import TorchRunner
from minivllm.engine.startup import build_engine
from minivllm.weights.files import resolve_model
from tests.tiny_model import write_tiny_model

MakeEngine = Callable[..., Engine]
BLOCK_BYTES = 2 * 2 * 2 * 8 * 16 * 4  # keys and values of 16 tokens in the tiny model, float32


@pytest.fixture
def make_tiny_engine(tmp_path: Path) -> MakeEngine:
    files = resolve_model(write_tiny_model(tmp_path), load_format="dummy")

    def make(*, runs_ahead: bool = False, num_blocks: int = 200, **settings: Any) -> Engine:
        config = EngineConfig(
            model=str(tmp_path),
            load_format="dummy",
            device="cpu",
            max_model_len=200,
            kv_cache_memory=num_blocks * BLOCK_BYTES,
            **settings,
        )
        engine = build_engine(config, files)
        assert isinstance(engine.runner, TorchRunner)
        engine.runner.runs_ahead = runs_ahead
        return engine

    return make
