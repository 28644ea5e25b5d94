"""Request ids: in with the request, out with every answer, and before each log line of that request."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from minivllm.server.request_id import RequestIdFilter
from minivllm.terminal import configure_logging

from .fakes import RunningServer, send_raw

FRESH = re.compile(r"[0-9a-f]{32}")
EVERY_KIND = [
    (200, "GET", "/health", None),
    (200, "GET", "/version", None),
    (200, "POST", "/v1/completions", {"prompt": "x"}),
    (200, "POST", "/v1/completions", {"prompt": "x", "stream": True}),
    (400, "POST", "/v1/completions", {"prompt": "x", "n": 0}),
    (404, "GET", "/nowhere", None),
    (405, "PUT", "/health", None),
    (413, "POST", "/tokenize", {"prompt": "x" * 200_000}),
    (500, "POST", "/v1/completions", {"prompt": "[crash]"}),
    (500, "POST", "/v1/completions", {"prompt": "[fail]"}),
]


@pytest.mark.parametrize(("status", "method", "path", "body"), EVERY_KIND)
def test_every_answer_carries_one(
    server: RunningServer, status: int, method: str, path: str, body: dict[str, object] | None
) -> None:
    response = server.http.request(method, path, json=body, headers={"X-Request-Id": "trace-17/a:b"})
    assert (response.status_code, response.headers.get_list("X-Request-Id")) == (status, ["trace-17/a:b"])
    seen = {server.http.request(method, path, json=body).headers["X-Request-Id"] for _ in range(3)}
    assert len(seen) == 3
    assert all(FRESH.fullmatch(id) for id in seen)


@pytest.mark.parametrize("id", ["x", "~!", "x" * 128, 'a"b\\c%s{0}'])
def test_ids_that_are_kept(server: RunningServer, id: str) -> None:
    assert server.http.get("/version", headers={"X-Request-Id": id}).headers["X-Request-Id"] == id


@pytest.mark.parametrize("lines", [[""], ["x" * 129], ["a b"], ["a\tb"], ["\xe9"], ["a", "b"], ["a", "a"]])
def test_ids_that_are_replaced(server: RunningServer, lines: list[str]) -> None:
    request = (
        "GET /version HTTP/1.1\r\nHost: test\r\n" + "".join(f"X-Request-Id: {x}\r\n" for x in lines) + "\r\n"
    )
    answer = send_raw(server.port, request.encode("latin-1"))
    assert answer.status == 200
    assert FRESH.fullmatch(answer.headers["X-Request-Id"])


def test_the_client_s_id_is_never_the_engine_s(server: RunningServer) -> None:
    for stream in (False, True):
        for _ in range(2):
            body = {"prompt": "x", "n": 2, "stream": stream}
            server.http.post("/v1/completions", json=body, headers={"X-Request-Id": "same"})
    assert len(server.engine.requests) == 8
    assert not any("same" in id for id in server.engine.requests)


def test_a_fresh_id_is_found_in_the_answer_and_the_engine(server: RunningServer) -> None:
    response = server.http.post("/v1/completions", json={"prompt": "x"})
    assert response.json()["id"] == f"cmpl-{response.headers['X-Request-Id']}"
    (engine_id,) = server.engine.requests
    assert engine_id.startswith(response.json()["id"])


def test_the_openai_package_shows_it(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": "Hi"}],
        extra_body={"model": None},
        extra_headers={"X-Request-Id": "from-me"},
    )
    assert answer._request_id == "from-me"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a server would print, its own lines and uvicorn's."""
    loggers = [logging.getLogger(name) for name in ("minivllm", "uvicorn.error")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    handler = configure_logging()
    assert isinstance(handler, logging.StreamHandler)
    handler.addFilter(RequestIdFilter())
    text = io.StringIO()
    handler.setStream(text)
    loggers[1].handlers = [handler]
    yield text
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize("stream", [False, True])
def test_log_lines_name_the_request(server: RunningServer, log: io.StringIO, stream: bool) -> None:
    for id in ("first-%s", "second"):
        body = {"prompt": "[crash]", "stream": stream}
        server.http.post("/v1/completions", json=body, headers={"X-Request-Id": id})
    logging.getLogger("minivllm").warning("of no request")
    heads = re.findall(r"^\d\d:\d\d:\d\d (\w) (\[\S+\] )?(.*)$", log.getvalue(), re.MULTILINE)
    assert [(level, id) for level, id, _ in heads] == [("E", "[first-%s] "), ("E", "[second] "), ("W", "")]
