"""Which device an engine gets, on machines that this one isn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.runner import TorchRunner
from minivllm.engine.startup import build_engine
from minivllm.errors import ConfigError
from minivllm.weights.files import resolve_model
from tests.tiny_model import write_tiny_model


def build(folder: Path, device: str) -> Engine:
    config = EngineConfig(
        model=write_tiny_model(folder), load_format="dummy", device=device, kv_cache_memory=10**6
    )
    return build_engine(config, resolve_model(config.model, load_format="dummy"))


def test_a_card_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused where it is asked for, and left alone where it isn't."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(
        ConfigError, match=r"^--device cuda: .* compute capability 7\.5, and 8\.0 is the least"
    ):
        build(tmp_path, "cuda")
    engine = build(tmp_path, "auto")
    assert isinstance(engine.runner, TorchRunner)
    assert engine.runner.model.placement.device.type == "cpu"
    assert "compute capability 7.5" in caplog.text


def test_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^--device cuda: torch finds no usable NVIDIA GPU here"):
        build(tmp_path, "cuda")
    engine = build(tmp_path, "auto")
    assert isinstance(engine.runner, TorchRunner)
    assert engine.runner.model.placement.device.type == "cpu"
