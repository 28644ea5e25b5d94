"""Requests that never come to their end: their connections close, with an answer where one makes sense."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from minivllm.config import ServerConfig
from minivllm.server import http11, refusal

from .fakes import send_raw, served

HEAD = b"GET /version HTTP/1.1\r\nHost: test\r\n"
POST = b"POST /tokenize HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(http11, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(refusal, "LINGER_SECONDS", 0.1)
    with served(ServerConfig()) as port:
        yield port


@pytest.mark.parametrize(
    "beginning",
    [
        b"G",
        HEAD,
        POST + b"Content-Length: 100\r\n\r\n",
        POST + b'Content-Length: 100\r\n\r\n{"prompt"',
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        HEAD + b"\r\n" + HEAD,  # the second of two
        HEAD + b"\r\n" + POST + b"Content-Length: 100\r\n\r\n{",
    ],
)
def test_a_request_that_stops_is_told_and_closed(port: int, beginning: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(beginning)
        if beginning.startswith(HEAD + b"\r\n"):
            received = b"".join(iter(lambda: client.recv(65536), b""))
            assert received.startswith(b"HTTP/1.1 200 ")
            assert received.count(b"HTTP/1.1 408 ") == 1
            return
        answer = HTTPResponse(client)
        answer.begin()
        assert (answer.status, answer.reason) == (408, "Request Timeout")
        assert answer.headers["Connection"] == "close"
        assert json.loads(answer.read())["error"]["code"] == "slow_request"
        assert client.recv(1) == b""


@pytest.mark.parametrize(
    ("rest", "status", "error"),
    [
        (b"Content-Length: 100\r\n\r\n{", "408", "slow_request"),
        (b"Transfer-Encoding: chunked\r\n\r\nno number\r\n", "400", "invalid_request_error"),
    ],
)
def test_the_metrics_have_the_answer(port: int, rest: bytes, status: str, error: str) -> None:
    """Not a client that left: it got an answer, though not from the application."""
    assert send_raw(port, POST + rest).status == int(status)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(POST + rest)
        assert b"".join(iter(lambda: client.recv(65536), b"")).startswith(b"HTTP/1.1 " + status.encode())
    text = send_raw(port, b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n").body.decode()
    requests = [line for line in text.splitlines() if "http_requests_total{" in line]
    assert len(requests) == 1
    assert f'status="{status}"' in requests[0]
    assert requests[0].endswith(" 2.0")
    errors = [line for line in text.splitlines() if f'code="{error}"' in line]
    assert [line.split()[-1] for line in errors if "http_errors_total{" in line] == ["2.0"]


def test_a_connection_without_a_request_is_closed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        assert client.recv(1) == b""


def test_a_head_in_drops_has_one_time_limit(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=0.1) as client:
        answer = b""
        for _ in range(100):  # ten seconds, if each byte began the time anew
            client.sendall(b"x")
            try:
                answer = client.recv(65536)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_body_in_drops_has_one_time_limit_for_each(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http11, "REQUEST_SECONDS", 3.0)
    with socket.create_connection(("127.0.0.1", port), timeout=0.25) as client:
        content = b'{"prompt": "x"}'
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(content))
        for i in range(len(content)):  # more than the limit in all
            with pytest.raises(TimeoutError):
                client.recv(1)
            client.sendall(content[i : i + 1])
        client.settimeout(10)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_who_is_idle_between_two_requests_has_another_limit(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http11, "REQUEST_SECONDS", 1.5)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(HEAD + b"\r\n")
        with HTTPResponse(client) as answer:
            answer.begin()
            assert answer.status == 200
            answer.read()
        client.settimeout(2)
        with pytest.raises(TimeoutError):  # it isn't closed
            client.recv(1)
        client.settimeout(10)
        client.sendall(HEAD)
        assert client.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_nobody_is_idle_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http11, "KEEP_ALIVE_SECONDS", 1)
    with served(ServerConfig()) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(HEAD + b"\r\n")
        assert b"".join(iter(lambda: client.recv(65536), b"")).startswith(b"HTTP/1.1 200 ")


def test_an_answer_may_take_longer(port: int) -> None:
    """The limit is the request's."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        content = json.dumps({"prompt": "[hang]", "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        received = client.recv(65536)
        while b'"text"' not in received:
            received += client.recv(65536)
        client.settimeout(1)
        with pytest.raises(TimeoutError):  # a second, and neither an end nor an error
            client.recv(65536)
        assert received.startswith(b"HTTP/1.1 200 ")
    assert send_raw(port, HEAD + b"\r\n").status == 200
