"""Request ids: in with the request, out with every answer, and before each log line of that request."""

from __future__ import annotations

import logging
import queue
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


def test_the_engine_learns_what_the_client_calls_a_request(server: RunningServer) -> None:
    """In a trace both names find it. Where the client gives none, the one it gets is part of the other."""
    requests = server.engine.client_ids
    for id in ("mine-3", None):
        before = set(requests)
        body = {"prompt": ["x", "y"], "max_tokens": 1}
        answer = server.http.post("/v1/completions", json=body, headers={"X-Request-Id": id} if id else {})
        new = set(requests) - before
        assert new == {f"{answer.json()['id']}-{number}" for number in range(2)}
        assert {requests[name] for name in new} == {id}
        if id is None:
            assert all(answer.headers["X-Request-Id"] in name for name in new)


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


class Log:
    """A stream that log lines are written to by the server's thread, and read from by the test's."""

    def __init__(self) -> None:
        self.records: queue.SimpleQueue[str] = queue.SimpleQueue()

    def write(self, text: str) -> None:
        self.records.put(text)

    def flush(self) -> None:
        pass


@pytest.fixture
def log() -> Iterator[Log]:
    """What a server prints."""
    logger = logging.getLogger("minivllm")
    before = logger.handlers, logger.level, logger.propagate
    handler = configure_logging()
    assert isinstance(handler, logging.StreamHandler)
    handler.addFilter(RequestIdFilter())
    log = Log()
    handler.setStream(log)
    yield log
    logger.handlers, logger.level, logger.propagate = before


@pytest.mark.parametrize("stream", [False, True])
def test_log_lines_name_the_request(server: RunningServer, log: Log, stream: bool) -> None:
    for id in ("first-%s", "second"):
        body = {"prompt": "[crash]", "stream": stream}
        server.http.post("/v1/completions", json=body, headers={"X-Request-Id": id})
        # The answer may be here before the line is.
        assert re.match(rf"\d\d:\d\d:\d\d E \[{id}\] ", log.records.get(timeout=10))
    logging.getLogger("minivllm").warning("of no request")
    assert re.match(r"\d\d:\d\d:\d\d W of no request\n", log.records.get(timeout=10))
    assert log.records.empty()
