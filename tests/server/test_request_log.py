"""``--request-log``: a line for whatever comes in, and nothing in it that is between client and server."""

from __future__ import annotations

import json
import queue
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.errors import ConfigError
from minivllm.request import CompletionOutput, FinishReason, RequestMetrics
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.server.keys import ApiKeys
from minivllm.server.record import RequestRecord
from minivllm.server.request_log import RequestLog, describe

from .fakes import ANSWER, MODEL, FakeEngine, make_tokenizer, run_server, send_raw

KEYS = ["first-secret", "second-secret"]
SECRET_PROMPT = "my diary"
ALL_FIELDS = {
    "time", "id", "method", "route", "status", "client_left", "error", "key", "total_ms", "model",
    "answer_id", "stream", "n", "max_tokens", "prompt_tokens", "cached_tokens", "completion_tokens",
    "finish_reasons",
    "preemptions", "prepare_ms", "queue_ms", "prefill_ms", "decode_ms",
}  # fmt: skip


class Logged:
    """A server that logs, and its log."""

    def __init__(self, port: int, path: Path, engine: FakeEngine, ended: queue.SimpleQueue[None]) -> None:
        self.port, self.path, self.engine, self._ended = port, path, engine, ended
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)
        self.http.headers["Authorization"] = f"Bearer {KEYS[1]}"

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def after(self, num_requests: int = 1) -> dict[str, Any]:
        """The last line, once that many more requests are over."""
        for _ in range(num_requests):
            self._ended.get(timeout=10)
        return self.lines()[-1]


@contextmanager
def logged(path: Path, **settings: Any) -> Iterator[Logged]:
    config = ServerConfig(request_log=str(path), max_body_size=1000, max_header_size=4000, **settings)
    tokenizer = make_tokenizer()
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()
    engine = FakeEngine(tokenizer)
    with closing(RequestLog(str(path))) as log:
        app = create_app(
            engine,
            tokenizer,
            config,
            MODEL,
            ServerState(),
            ApiKeys(KEYS),
            on_request_end=[log, lambda record: ended.put(None)],
        )
        with run_server(app, config) as port:
            server = Logged(port, path, engine, ended)
            yield server
            server.http.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Logged]:
    with logged(tmp_path / "requests.jsonl") as server:
        yield server


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer(server: Logged, is_streamed: bool) -> None:
    body = {"prompt": "abcdef", "n": 2, "max_tokens": 8, "stream": is_streamed}
    before = time.time()
    answer = server.http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
    answer_id = json.loads(answer.text.partition("\n")[0].removeprefix("data: "))["id"]
    line = server.after()
    assert line.keys() == ALL_FIELDS
    assert {name: line[name] for name in ALL_FIELDS - {"time", "total_ms"}} == {
        "id": "mine",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "client_left": False,
        "error": None,
        "key": "key-2",
        "model": MODEL,
        "answer_id": answer_id,
        "stream": is_streamed,
        "n": 2,
        "max_tokens": 8,
        "prompt_tokens": 6,
        "cached_tokens": 3,
        "completion_tokens": 16,
        "finish_reasons": ["length", "length"],
        "preemptions": 0,
        "prepare_ms": None,  # the fake engine tells no times
        "queue_ms": None,
        "prefill_ms": None,
        "decode_ms": None,
    }
    assert 0 < line["total_ms"] < 10_000
    assert line["time"].endswith("Z")
    assert line["time"][:10] == time.strftime("%Y-%m-%d", time.gmtime(before))


def test_chat_and_a_stop_string(server: Logged) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = server.http.post("/v1/chat/completions", json={"messages": messages, "stop": "Tag"}).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    line = server.after()
    assert (line["route"], line["finish_reasons"]) == ("/v1/chat/completions", ["stop"])
    assert line["completion_tokens"] == answer["usage"]["completion_tokens"] < len(ANSWER.encode())


def test_refusals(server: Logged) -> None:
    """Whoever is refused, and wherever, leaves a line with the status that was sent."""
    post = "/v1/completions"
    none: dict[str, Any] = {"headers": {"Authorization": ""}}
    json_type = {"Content-Type": "application/json"}
    cases: list[tuple[int, str | None, str, str, dict[str, Any]]] = [
        (400, "invalid_request_error", "POST", post, {"content": b"{", "headers": json_type}),
        (400, "invalid_request_error", "POST", post, {"json": {"prompt": "a", "max_tokens": 0}}),
        (400, "invalid_request_error", "POST", post, {"json": {"prompt": "a", "colour": "red"}}),
        (400, "context_length_exceeded", "POST", post, {"json": {"prompt": "a" * 300}}),
        (404, "model_not_found", "POST", post, {"json": {"prompt": "a", "model": "other"}}),
        (404, "invalid_request_error", "GET", "/nothing", {}),
        (405, "invalid_request_error", "GET", post, {}),
        (401, "invalid_api_key", "POST", post, {"json": {"prompt": "a"}, **none}),
        (413, "body_too_large", "POST", post, {"json": {"prompt": "a" * 2000}}),
        (431, "headers_too_large", "GET", "/version", {"headers": {"X": "a" * 3900}}),
        (500, "request_failed", "POST", post, {"json": {"prompt": "[fail]", "n": 2}}),
        (500, "internal_error", "POST", post, {"json": {"prompt": "[crash]"}}),
        (200, "request_failed", "POST", post, {"json": {"prompt": "[fail]", "stream": True}}),
    ]  # fmt: skip
    for status, error, method, path, arguments in cases:
        answer = server.http.request(method, path, **arguments)
        line = server.after()
        assert (answer.status_code, line["status"], line["error"]) == (status, status, error), arguments
        assert (line["method"], line["id"]) == (method, answer.headers["X-Request-Id"])
        assert line["key"] == (None if status in (401, 431) else "key-2")
        assert not line["client_left"]
    routes = [line["route"] for line in server.lines()]
    assert "/nothing" in routes
    assert {line["finish_reasons"][0] for line in server.lines() if line.get("finish_reasons")} == {"error"}


@pytest.mark.parametrize(("is_streamed", "status"), [(False, 504), (True, 200)])
def test_a_deadline_that_passes(server: Logged, is_streamed: bool, status: int) -> None:
    server.http.post("/v1/completions", json={"prompt": "[late]", "stream": is_streamed})
    line = server.after()
    assert (line["status"], line["error"], line["client_left"]) == (status, "deadline_exceeded", False)
    assert line["finish_reasons"] == ["timeout"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves(server: Logged, is_streamed: bool) -> None:
    body = json.dumps({"prompt": "[hang]", "stream": is_streamed})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS[0]}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall((head + body).encode())
        server.engine.started.get(timeout=10)
    line = server.after()
    assert (line["client_left"], line["status"], line["key"]) == (True, 200 if is_streamed else 499, "key-1")
    assert line["finish_reasons"] == ["abort"]


def test_a_client_that_leaves_while_it_sends(server: Logged) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        client.sendall((head + "Content-Length: 50\r\n\r\n{").encode())
    line = server.after()
    assert (line["client_left"], line["status"], line["route"]) == (True, 499, "/v1/completions")


def test_probes_leave_no_lines_while_all_is_well(server: Logged) -> None:
    for path in ("/health", "/ping", "/metrics"):
        assert server.http.get(path).status_code == 200
    assert server.http.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
    server.after(4)
    (line,) = server.lines()
    assert (line["route"], line["status"]) == ("/metrics", 401)


def test_no_prompts_no_answers_and_no_keys(server: Logged) -> None:
    chat = {"messages": [{"role": "user", "content": SECRET_PROMPT}]}
    server.http.post("/v1/chat/completions", json=chat)
    server.http.post("/v1/completions", json={"prompt": SECRET_PROMPT})
    server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": SECRET_PROMPT})
    server.http.post("/v1/completions", json={"prompt": "a", "model": "other"})
    server.http.get(f"/version?key={KEYS[0]}")
    server.http.get("/version", headers={"Authorization": "Bearer wrong-secret"})
    server.after(6)
    text = server.path.read_text()
    assert len(text.splitlines()) == 6
    for secret in (SECRET_PROMPT, ANSWER, ANSWER[:8], *KEYS, "wrong-secret"):
        assert secret not in text


def test_prompts_where_the_operator_wants_them(tmp_path: Path) -> None:
    with logged(tmp_path / "log", log_prompts=True) as server:
        prompt = 'Grüße\n"\u2028'
        server.http.post("/v1/completions", json={"prompt": [prompt, "b"], "max_tokens": 1})
        assert server.after()["prompts"] == [prompt, "b"]
        server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        assert server.after()["prompts"] == ["user: Hi\nassistant: "]
        assert len(server.path.read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match="--log-prompts needs --request-log"):
        ServerConfig(log_prompts=True)


def test_a_client_cannot_write_lines_of_its_own(server: Logged) -> None:
    send_raw(server.port, b'GET /%0A{"id":1}%00 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n')
    line = server.after()
    assert line["route"] == '/\n{"id":1}\x00'
    assert len(server.path.read_bytes().splitlines()) == 1


def test_long_names_are_cut(server: Logged) -> None:
    """A client's model and path, which may have thousands of characters."""
    server.http.post("/v1/completions", json={"prompt": "a", "model": "m" * 900})
    line = server.after()
    assert (line["error"], line["model"]) == ("model_not_found", "m" * 200)
    server.http.get("/" + "p" * 900)
    assert server.after()["route"] == "/" + "p" * 199


def test_a_log_that_is_moved_away_is_opened_anew(server: Logged, tmp_path: Path) -> None:
    server.http.get("/version")
    server.after()
    server.path.rename(tmp_path / "old")
    server.http.get("/v1/models")
    assert [line["route"] for line in (server.after(),)] == ["/v1/models"]
    assert "/version" in (tmp_path / "old").read_text()


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't write --request-log .*/nowhere/log: No such file"):
        RequestLog(str(tmp_path / "nowhere" / "log"))


def test_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(RequestLog("-")) as log:
        log(RequestRecord("a", "GET", "/version"))
    assert json.loads(capsys.readouterr().out)["id"] == "a"


def test_times_are_the_slowest_sample_s() -> None:
    def output(index: int, *moments: float) -> CompletionOutput:
        arrival, scheduled, first, finished = moments
        times = RequestMetrics(arrival, scheduled, first, finished, num_cached_tokens=16, num_preemptions=1)
        return CompletionOutput(index, "", [1, 2], FinishReason.STOP, None, times)

    record = RequestRecord("a", "POST", "/v1/completions", received_at=10.0, model="m", num_samples=2)
    record.outputs = {
        1: output(1, 10.5, 11.0, 14.0, 15.0),
        0: output(0, 10.25, 11.5, 12.0, 0.0),  # broken off: it ended with the request
    }
    record.status, record.is_complete, record.ended_at, record.prompt_lengths = 200, True, 18.0, [30]
    line = describe(record)
    expected = {
        "prepare_ms": 500, "queue_ms": 1250, "prefill_ms": 3000, "decode_ms": 6000, "total_ms": 8000,
        "preemptions": 2, "cached_tokens": 16, "prompt_tokens": 30, "completion_tokens": 4,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
