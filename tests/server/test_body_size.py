"""Bodies over ``--max-body-size``: refused without reading them all, and the client gets to know."""

from __future__ import annotations

import json
import socket

import pytest

from minivllm.config import ServerConfig
from minivllm.server import refusal

from .fakes import MAX_BODY_SIZE, RunningServer, send_raw, served

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


def says_too_large(status: int, content: bytes) -> None:
    assert status == 413
    error = json.loads(content)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "body_too_large"
    assert f"at most {MAX_BODY_SIZE} bytes" in error["message"]


def read_answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of the one answer on this connection, which the server then closes."""
    client.settimeout(5)
    data = b""
    while piece := client.recv(65536):
        data += piece
    head, _, content = data.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), content


@pytest.fixture
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "LINGER_SECONDS", 0.2)


@pytest.mark.usefixtures("short_linger")
def test_content_length_is_enough(server: RunningServer) -> None:
    """The answer comes though almost nothing of a terabyte was sent."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(HEAD + b"Content-Length: 1000000000000\r\n\r\n{")
        says_too_large(*read_answer(client))


@pytest.mark.usefixtures("short_linger")
def test_eight_mebibytes_unless_told_otherwise() -> None:
    with served(ServerConfig()) as port:
        answer = send_raw(port, HEAD + b"Content-Length: %d\r\n\r\n{" % (8 * 2**20 + 1), method="POST")
    assert answer.error["code"] == "body_too_large"
    assert "at most 8388608 bytes" in str(answer.error["message"])


@pytest.mark.usefixtures("short_linger")
def test_endless_chunks(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(MAX_BODY_SIZE // 10_000 + 1):
            client.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        says_too_large(*read_answer(client))


@pytest.mark.usefixtures("short_linger")
def test_client_that_waits_for_100_continue_sends_nothing(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(HEAD + b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n")
        says_too_large(*read_answer(client))


@pytest.mark.parametrize("is_chunked", [False, True])
def test_client_that_sends_everything_before_it_reads(server: RunningServer, is_chunked: bool) -> None:
    """Closing at once would reset the connection, and the client would fail before it reads the answer."""
    piece = b"x" * 100_000
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        if is_chunked:
            client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        else:
            client.sendall(HEAD + b"Content-Length: 20000000\r\n\r\n")
        for _ in range(200):
            client.sendall(b"186a0\r\n" + piece + b"\r\n" if is_chunked else piece)
        if is_chunked:
            client.sendall(b"0\r\n\r\n")
        says_too_large(*read_answer(client))


def test_largest_body_and_one_byte_more(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}
    content = b'{"prompt": "x"}'.ljust(MAX_BODY_SIZE)
    assert server.http.post("/v1/completions", content=content, headers=headers).status_code == 200
    response = server.http.post("/v1/completions", content=content + b" ", headers=headers)
    says_too_large(response.status_code, response.content)
    response = server.http.post("/v1/completions", content=iter([content, b" "]), headers=headers)
    says_too_large(response.status_code, response.content)
