"""The embedded model as it is served by default, once for all tests here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.grammar import Grammars
from minivllm.engine.runner import TorchRunner
from minivllm.engine.startup import load_model, make_engine
from minivllm.models.llama import Llama
from minivllm.tokenizer.load import load_tokenizer
from minivllm.tokenizer.tokenizer import Tokenizer
from minivllm.weights.files import ModelFiles

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def tokenizer(embedded_files: ModelFiles) -> Tokenizer:
    return load_tokenizer(embedded_files)


@pytest.fixture(scope="session")
def grammars(embedded_files: ModelFiles, tokenizer: Tokenizer) -> Grammars:
    config = embedded_files.config
    return Grammars(lambda: tokenizer, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)


@pytest.fixture(scope="session")
def _served_model(embedded_files: ModelFiles) -> Llama:
    return load_model(EngineConfig(device="cpu"), embedded_files)


@pytest.fixture(scope="session")
def make(embedded_files: ModelFiles, _served_model: Llama, grammars: Grammars) -> MakeEngine:
    """An engine with any settings; all share one set of compiled grammars."""

    def make(*, runs_ahead: bool = False, **settings: Any) -> Engine:
        engine = make_engine(EngineConfig(device="cpu", **settings), embedded_files, _served_model)
        assert isinstance(engine.runner, TorchRunner)
        engine.grammars = engine.runner.grammars = grammars
        engine.runner.runs_ahead = runs_ahead
        return engine

    return make
