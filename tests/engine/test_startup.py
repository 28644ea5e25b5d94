"""What an operator is told when an engine starts, and which device it gets."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.runner import TorchRunner
from minivllm.engine.startup import build_engine
from minivllm.errors import ConfigError
from minivllm.weights.files import resolve_model
from tests.tiny_model import write_tiny_model
from tests.weights.tiny_models import save_tiny_llama


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


@pytest.mark.parametrize(("eos_token_id", "is_told"), [(2, False), (None, True), ("left out", True)])
def test_a_model_without_an_end_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, eos_token_id: Any, is_told: bool
) -> None:
    """2, transformers' default, is an ordinary token in many a vocabulary: it isn't made up."""
    model = save_tiny_llama(tmp_path)
    (model / "generation_config.json").unlink()
    settings = json.loads((model / "config.json").read_text()) | {"eos_token_id": eos_token_id}
    if eos_token_id == "left out":
        del settings["eos_token_id"]
    (model / "config.json").write_text(json.dumps(settings))
    config = EngineConfig(model=str(model), device="cpu", max_model_len=64, kv_cache_memory=2**20)
    with caplog.at_level(logging.WARNING, logger="minivllm.engine.startup"):
        build_engine(config, resolve_model(str(model)))
    told = [record.getMessage() for record in caplog.records if "eos_token_id" in record.getMessage()]
    assert len(told) == is_told
    assert all(line.startswith(f"{model} names no end-of-turn token") for line in told)
