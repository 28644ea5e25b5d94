"""Models, health, version, tokenize and detokenize."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import httpx
import openai
import pytest

import minivllm
from minivllm.config import ServerConfig
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.tokenizer.tokenizer import Tokenizer

from .fakes import ANSWER, EOS, MAX_MODEL_LEN, MODEL, FakeEngine, RunningServer, make_tokenizer

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def ask(
    method: str,
    path: str,
    *,
    json: Any = None,
    engine: FakeEngine | None = None,
    tokenizer: Tokenizer | None = None,
    is_draining: bool = False,
) -> httpx.Response:
    """One request to an application of its own."""
    tokenizer = tokenizer or make_tokenizer()
    engine = engine or FakeEngine(tokenizer)

    async def send() -> httpx.Response:
        app = create_app(engine, tokenizer, ServerConfig(), MODEL, ServerState(is_draining))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, json=json)

    return asyncio.run(send())


def test_models(server: RunningServer) -> None:
    (model,) = server.openai.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "minivllm")
    assert model.model_dump()["max_model_len"] == MAX_MODEL_LEN
    assert server.openai.models.retrieve(MODEL) == model  # its name has a slash, as Hugging Face ids do
    with pytest.raises(openai.NotFoundError) as error:
        server.openai.models.retrieve("gpt-5")
    assert error.value.code == "model_not_found"


def test_health(server: RunningServer) -> None:
    for path in ("/health", "/ping", "/ready"):
        response = server.http.get(path)
        assert response.status_code == 200
        assert response.json() == {"status": "ok", "num_running": 2, "num_waiting": 1, "kv_cache_usage": 0.25}


def test_version(server: RunningServer) -> None:
    assert server.http.get("/version").json() == {"version": minivllm.__version__}


def test_draining_refuses_new_requests() -> None:
    for method, path, json in (
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/completions", {"prompt": "x", "stream": True}),
    ):
        response = ask(method, path, json=json, is_draining=True)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "shutting_down"
    assert ask("GET", "/v1/models", is_draining=True).status_code == 200
    for path, status_code in (("/ready", 503), ("/health", 200), ("/ping", 200)):
        response = ask("GET", path, is_draining=True)
        assert (response.status_code, response.json()["status"]) == (status_code, "draining")


def test_dead_engine() -> None:
    engine = FakeEngine(make_tokenizer())
    engine.is_alive = False
    response = ask("POST", "/v1/chat/completions", json=CHAT, engine=engine)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_restarting")
    assert int(response.headers["Retry-After"]) > 0
    for is_hopeless, status_code in ((False, 200), (True, 503)):
        engine.is_hopeless = is_hopeless
        assert ask("GET", "/health", engine=engine).status_code == status_code
        response = ask("GET", "/ready", engine=engine)
        assert (response.status_code, response.json()["status"]) == (503, "restarting")


def test_unforeseen_error_keeps_its_details() -> None:
    response = ask("POST", "/v1/completions", json={"prompt": "[crash]"})
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "internal error: the server's log says more",
        "type": "internal_error",
        "param": None,
        "code": None,
    }


def test_a_deadline_that_passes() -> None:
    response = ask("POST", "/v1/completions", json={"prompt": "[late]"})
    assert response.status_code == 504
    assert response.json()["error"] == {
        "message": "the request wasn't finished in time",
        "type": "timeout_error",
        "param": None,
        "code": "deadline_exceeded",
    }


def test_tokenize_and_back(server: RunningServer) -> None:
    tokens = server.http.post("/tokenize", json={"prompt": ANSWER + EOS}).json()
    assert tokens["tokens"][:-1] == list(ANSWER.encode())
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == MAX_MODEL_LEN
    back = server.http.post("/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json() == {"prompt": ANSWER + EOS}
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_tokenize_messages_is_what_chat_sends(server: RunningServer) -> None:
    tokens = server.http.post("/tokenize", json=CHAT).json()["tokens"]
    server.http.post("/v1/chat/completions", json=CHAT)
    ((prompt, _),) = server.engine.requests.values()
    assert tokens == prompt == list(b"user: Hi\nassistant: ")


def test_openapi_describes_bodies_and_errors(server: RunningServer) -> None:
    document = server.http.get("/openapi.json").json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/ErrorEnvelope"
    )
    assert "422" not in operation["responses"]


def test_server_does_not_import_torch() -> None:
    """It would cost seconds and memory, in a process that computes nothing."""
    code = "import sys, minivllm.server.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
