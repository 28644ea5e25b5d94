"""Clients that leave: every sequence of theirs is aborted, whatever they were waiting for."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest

from .fakes import RunningServer

PATIENCE = 5.0  # seconds that an abort may take; it takes milliseconds


def connect(server: RunningServer, body: dict[str, Any]) -> socket.socket:
    """A client that has sent its request, and waits."""
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(head.encode() + content)
    return client


@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.parametrize(("prompts", "n"), [(["[hang]"], 1), (["[hang] a", "[hang] b"], 3)])
def test_leaving_aborts_every_sample(
    server: RunningServer, is_streaming: bool, prompts: list[str], n: int
) -> None:
    client = connect(server, {"prompt": prompts, "n": n, "stream": is_streaming})
    started = {server.engine.started.get(timeout=PATIENCE) for _ in range(n * len(prompts))}
    assert server.engine.closed.empty()
    client.close()
    assert {server.engine.closed.get(timeout=PATIENCE) for _ in started} == started


@pytest.mark.parametrize("is_streaming", [False, True])
def test_leaving_is_noticed_behind_a_further_request(server: RunningServer, is_streaming: bool) -> None:
    client = connect(server, {"prompt": "[hang]", "stream": is_streaming})
    started = server.engine.started.get(timeout=PATIENCE)
    client.sendall(b"GET /version HTTP/1.1\r\nHost: test\r\n\r\n" * 2)
    client.close()
    assert server.engine.closed.get(timeout=PATIENCE) == started


def test_many_requests_at_once_are_answered_in_turn(server: RunningServer) -> None:
    """More than is read ahead of the answers: the rest waits in the network."""
    content = json.dumps({"tokens": [65] * 20_000}).encode()
    head = (
        "POST /detokenize HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        sending = threading.Thread(target=client.sendall, args=((head.encode() + content) * 20,))
        sending.start()
        received = b""
        while received.count(b"HTTP/1.1 200 ") < 20:
            chunk = client.recv(65536)
            assert chunk
            received += chunk
        sending.join()


def test_leaving_leaves_others_alone(server: RunningServer) -> None:
    staying, leaving = (connect(server, {"prompt": "[hang]", "stream": True}) for _ in range(2))
    for _ in range(2):
        server.engine.started.get(timeout=PATIENCE)
    leaving.close()
    first = server.engine.closed.get(timeout=PATIENCE)
    assert server.engine.closed.empty()
    staying.close()
    assert server.engine.closed.get(timeout=PATIENCE) != first


def test_hundred_clients_leave(server: RunningServer) -> None:
    clients = [connect(server, {"prompt": "[hang]", "stream": i % 2 == 0}) for i in range(100)]
    started = {server.engine.started.get(timeout=PATIENCE) for _ in clients}
    for client in clients:
        client.close()
    assert {server.engine.closed.get(timeout=PATIENCE) for _ in clients} == started
    assert server.http.post("/v1/completions", json={"prompt": "still there?"}).status_code == 200


def test_leaving_while_sending(server: RunningServer) -> None:
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\n{")
    client.close()
    assert server.http.get("/health").status_code == 200
    assert not server.engine.requests


@pytest.mark.parametrize("is_streaming", [False, True])
def test_one_failing_sample_aborts_the_others(server: RunningServer, is_streaming: bool) -> None:
    response = server.http.post("/v1/completions", json={"prompt": "[fail]", "n": 4, "stream": is_streaming})
    assert "the step raised" in response.text
    closed = {server.engine.closed.get(timeout=PATIENCE) for _ in range(4)}
    assert closed == set(server.engine.requests)
