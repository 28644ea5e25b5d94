"""One running server for all tests here."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest

from minivllm.config import ServerConfig
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.tokenizer.tokenizer import Tokenizer

from .fakes import MAX_BODY_SIZE, MODEL, FakeEngine, RunningServer, make_tokenizer, run_server


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def _shared_server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    engine = FakeEngine(tokenizer)
    config = ServerConfig(max_body_size=MAX_BODY_SIZE)
    with run_server(create_app(engine, tokenizer, config, MODEL, ServerState()), config) as port:
        server = RunningServer(engine, port)
        yield server
        server.close()


@pytest.fixture
def server(_shared_server: RunningServer) -> RunningServer:
    """One server for all tests, with nothing left over from the test before."""
    engine = _shared_server.engine
    engine.requests.clear()
    engine.started, engine.closed = queue.SimpleQueue(), queue.SimpleQueue()
    return _shared_server
