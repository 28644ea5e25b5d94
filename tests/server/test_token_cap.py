"""--max-tokens-per-request: prompts times n times max_tokens, over all samples of a request."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.request import SamplingParams
from minivllm.server.app import create_app
from minivllm.server.context import ServerState

from .fakes import MAX_MODEL_LEN, MODEL, FakeEngine, RunningServer, make_tokenizer, run_server

LIMIT = 100


@pytest.fixture(scope="module")
def capped() -> Iterator[RunningServer]:
    tokenizer = make_tokenizer()
    engine = FakeEngine(tokenizer)
    config = ServerConfig(max_tokens_per_request=LIMIT)
    with run_server(create_app(engine, tokenizer, config, MODEL, ServerState()), config) as port:
        server = RunningServer(engine, port)
        yield server
        server.close()


def complete(server: RunningServer, **body: Any) -> tuple[httpx.Response, list[SamplingParams]]:
    """The answer, and what the engine was asked for."""
    server.engine.requests.clear()
    response = server.http.post("/v1/completions", json=body)
    return response, [sampling for _, sampling in server.engine.requests.values()]


def test_random_products(capped: RunningServer) -> None:
    rng = random.Random(5)
    statuses = set()
    for _ in range(60):
        prompts, n, max_tokens = rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 20)
        response, samplings = complete(capped, prompt=["x"] * prompts, n=n, max_tokens=max_tokens)
        assert response.status_code == (200 if prompts * n * max_tokens <= LIMIT else 400)
        statuses.add(response.status_code)
        if response.status_code == 200:
            assert [sampling.max_tokens for sampling in samplings] == [max_tokens] * (prompts * n)
        else:
            error = response.json()["error"]
            assert error["param"] == "max_tokens"
            assert f"at most {LIMIT}" in error["message"]
            assert f"{prompts * n} samples of {max_tokens} tokens" in error["message"]
            assert samplings == []
    assert statuses == {200, 400}


def test_an_open_limit_becomes_a_share(capped: RunningServer) -> None:
    assert complete(capped, prompt="x")[1][0].max_tokens == 16, "the route's own default is less"
    _, samplings = complete(capped, prompt=["x", "y", "z"], n=3)
    assert [sampling.max_tokens for sampling in samplings] == [11] * 9
    response, _ = complete(capped, prompt=["x"] * 101)
    assert response.status_code == 400
    assert "got 101 samples" in response.json()["error"]["message"]

    capped.engine.requests.clear()
    messages = [{"role": "user", "content": "Hi"}]
    assert capped.http.post("/v1/chat/completions", json={"messages": messages, "n": 2}).status_code == 200
    assert [s.max_tokens for _, s in capped.engine.requests.values()] == [50, 50]
    refused = capped.http.post(
        "/v1/chat/completions", json={"messages": messages, "max_completion_tokens": 101}
    )
    assert refused.json()["error"]["param"] == "max_completion_tokens"


def test_the_context_may_be_less(capped: RunningServer) -> None:
    messages = [{"role": "user", "content": "x" * 200}]
    capped.engine.requests.clear()
    assert capped.http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    ((prompt, sampling),) = capped.engine.requests.values()
    assert sampling.max_tokens == MAX_MODEL_LEN - len(prompt) < LIMIT


def test_no_cap_by_default(server: RunningServer) -> None:
    response, samplings = complete(server, prompt=["x"] * 10, n=10, max_tokens=200)
    assert response.status_code == 200
    assert len(samplings) == 100
