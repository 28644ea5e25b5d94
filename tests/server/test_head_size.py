"""Request heads that are too large or no HTTP: a clear answer, and nothing piles up."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from minivllm.config import ServerConfig
from minivllm.server import refusal

from .fakes import send_raw, served

MAX_SIZE, MAX_COUNT = 8192, 40
HEAD = b"GET /version HTTP/1.1\r\nHost: test\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(ServerConfig(max_header_size=MAX_SIZE, max_header_count=MAX_COUNT)) as port:
        yield port


@pytest.fixture(autouse=True)
def _short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "LINGER_SECONDS", 0.2)


def test_size_and_one_byte_more(port: int) -> None:
    """Counted as sent, down to the last line end."""
    rest = b"X: " + b"y" * (MAX_SIZE - len(HEAD) - len(b"X: \r\n\r\n"))
    request = HEAD + rest + b"\r\n\r\n"
    assert len(request) == MAX_SIZE
    assert send_raw(port, request).status == 200
    answer = send_raw(port, HEAD + rest + b"y\r\n\r\n")
    assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
    assert f"at most {MAX_SIZE} bytes" in str(answer.error["message"])
    assert answer.headers["X-Request-Id"]


def test_count_and_one_more(port: int) -> None:
    lines = b"X: y\r\n" * (MAX_COUNT - 1)  # and Host
    assert send_raw(port, HEAD + lines + b"\r\n").status == 200
    answer = send_raw(port, HEAD + lines + b"X: y\r\n\r\n")
    assert answer.status == 431
    assert answer.error["message"] == "a request must have at most 40 header lines, got 41"


@pytest.mark.parametrize(
    "start", [HEAD + b"X: ", b"GET /", b"x", HEAD + b"X: y\r\n" * 1000, HEAD + b"X: \r\n " * 999]
)
def test_endless_heads(port: int, start: bytes) -> None:
    """The client sends and sends, and gets the answer when it reads at last, and soon no more is taken."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(start)
        for _ in range(200):
            client.sendall(b"y" * 10_000)
        with HTTPResponse(client) as answer:
            answer.begin()
            assert (answer.status, answer.reason) == (431, "Request Header Fields Too Large")
            assert json.loads(answer.read())["error"]["code"] == "headers_too_large"
        with contextlib.suppress(OSError):
            while True:
                client.sendall(b"y" * 10_000)
        with contextlib.suppress(ConnectionError):
            assert client.recv(65536) == b""


def test_long_target(port: int) -> None:
    assert send_raw(port, b"GET /version?" + b"x" * 7000 + b" HTTP/1.1\r\nHost: t\r\n\r\n").status == 200
    assert send_raw(port, b"GET /version?" + b"x" * 9000 + b" HTTP/1.1\r\nHost: t\r\n\r\n").status == 431
    assert send_raw(port, b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: t\r\n\r\n").status == 431


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n\r\nhello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS on a plain port
        b"GET /version HTTP/1.1\r\n\r\n",  # no Host
        b"GET /version HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /vers\xc3\xafon HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        HEAD + b"No colon\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5x\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
        HEAD + b"X: a\x00b\r\n\r\n",
    ],
)
def test_what_is_no_http(port: int, request_: bytes) -> None:
    answer = send_raw(port, request_)
    assert answer.status in (400, 501)
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["Connection"] == "close"


def test_a_malformed_chunk_ends_the_request(port: int) -> None:
    """Whether the application was still reading, or had begun to answer."""
    answer = send_raw(
        port,
        b"POST /tokenize HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
        method="POST",
    )
    assert answer.status == 400
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999999\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        client.sendall(b"zz\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 4")
    assert send_raw(port, HEAD + b"\r\n").status == 200
