"""Starting and stopping: what an operator sees of a server's life."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.serve import _bind, _drain
from minivllm.server.admission import WaitingRoom
from tests.conftest import wait_until
from tests.serving.conftest import EMBEDDED_MODEL, Server, run_patched, serving
from tests.tiny_model import write_tiny_model

COMPLETION = {"prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True}


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[str, ...]:
    """Flags that serve a model of a few thousand weights."""
    return ("--model", write_tiny_model(tmp_path), "--load-format", "dummy", "--kv-cache-memory", "4MB")


class Streamed(threading.Thread):
    """A streamed completion, read in a thread of its own."""

    def __init__(self, server: Server, max_tokens: int) -> None:
        super().__init__()
        self.server, self.max_tokens = server, max_tokens
        self.lines: list[str] = []
        self.has_begun = threading.Event()
        self.start()

    def run(self) -> None:
        body = {**COMPLETION, "max_tokens": self.max_tokens, "stream": True}
        url = f"{self.server.url}/v1/completions"
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # cut off: the lines so far are what there is
            httpx.stream("POST", url, json=body, timeout=60) as response,
        ):
            for line in response.iter_lines():
                self.lines.append(line)
                self.has_begun.set()


def test_sigterm_finishes_what_runs_and_refuses_the_rest(tiny: tuple[str, ...]) -> None:
    with serving(*tiny) as server:
        running = Streamed(server, max_tokens=3000)
        assert running.has_begun.wait(60)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            assert client.get("/health").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/ready").status_code != 200)
            assert client.get("/health").status_code == 200
            refused = client.post("/v1/completions", json={**COMPLETION, "max_tokens": 1})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
        running.join()
        assert running.lines[-2:] == ["data: [DONE]", ""]
        events = [json.loads(line[6:]) for line in running.lines if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0


@pytest.mark.parametrize("ends_in_time", [True, False])
def test_a_drain_waits_for_who_has_arrived(ends_in_time: bool) -> None:
    """For a request that is still being tokenised, too, though the engine doesn't know it yet."""

    class Engine:
        is_closed = False

        async def close(self) -> None:
            self.is_closed = True

    async def stop() -> None:
        room, engine = WaitingRoom(), Engine()
        ticket = room.enter()
        draining = asyncio.create_task(_drain(room, engine, 60 if ends_in_time else 0.01))  # type: ignore[arg-type]
        if not ends_in_time:
            await asyncio.wait({draining})
        for _ in range(10):
            await asyncio.sleep(0)
        assert draining.done() == engine.is_closed == (not ends_in_time)
        room.leave(ticket)
        await draining
        assert engine.is_closed == (not ends_in_time)

    asyncio.run(stop())


def test_a_client_that_does_not_read_is_cut_off_in_a_line(tiny: tuple[str, ...]) -> None:
    with serving(*tiny, "--shutdown-timeout", "0") as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", httpx.URL(server.url).port))
        body = json.dumps({**COMPLETION, "max_tokens": 4000, "stream": True, "logprobs": 20}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.health()["num_running"])
        wait_until(lambda: not server.health()["num_running"])
        assert server.stop() == 0
    assert [line for line in server.log if "1 clients didn't read their answers" in line]
    assert not [line for line in server.log if "Traceback" in line]


def test_shutdown_timeout_ends_what_is_left(tiny: tuple[str, ...]) -> None:
    with serving(*tiny, "--shutdown-timeout", "0") as server:
        running = Streamed(server, max_tokens=4000)
        assert running.has_begun.wait(60)
        assert server.stop() == 0
        running.join()
        error = json.loads([line for line in running.lines if line][-1][6:])["error"]
        assert error["code"] == "shutting_down"
        assert "data: [DONE]" not in running.lines


def test_a_second_signal_stops_at_once(tiny: tuple[str, ...]) -> None:
    with serving(*tiny, "--shutdown-timeout", "600") as server:
        running = Streamed(server, max_tokens=4000)
        assert running.has_begun.wait(60)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any("stopping" in line for line in server.log))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 1
        running.join()


def engine_process(server: Server) -> int:
    """The engine's process id. The server has another child once a grammar was checked, not before."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    if not children.exists():
        pytest.skip("finds the engine process in /proc")
    return int(children.read_text().split()[0])


def test_a_dead_engine_is_told_and_replaced(tiny: tuple[str, ...]) -> None:
    with serving(*tiny) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        expected = client.post("/v1/completions", json={**COMPLETION, "max_tokens": 8}).json()["choices"]
        running = Streamed(server, max_tokens=4000)
        assert running.has_begun.wait(60)
        os.kill(engine_process(server), signal.SIGKILL)
        running.join()
        error = json.loads([line for line in running.lines if line][-1][6:])["error"]
        assert error["code"] == "engine_dead"
        answer = client.post("/v1/completions", json={**COMPLETION, "max_tokens": 8})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_restarting"
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        wait_until(lambda: client.get("/ready").status_code == 200)
        answer = client.post("/v1/completions", json={**COMPLETION, "max_tokens": 8})
        assert answer.json()["choices"] == expected
        assert server.stop() == 0


@pytest.mark.parametrize("optimize", [(), ("-O",)], ids=["plain", "-O"])
def test_optimised_python_changes_nothing(optimize: tuple[str, ...]) -> None:
    """The checks of bad input and the answers are the same when assert statements are stripped."""
    with serving(python=optimize) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        chat = {"messages": [{"role": "user", "content": "Name the capital of France."}], "temperature": 0}
        answer = client.post("/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
        for bad in ({"temperature": -1}, {"max_tokens": 0}, {"n": 0}, {"max_tokens": 10**6}):
            refused = client.post("/v1/chat/completions", json={**chat, **bad})
            assert refused.status_code == 400
            assert str(next(iter(bad.values()))) in refused.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": [10**9]}).status_code == 400
        assert server.stop() == 0


def test_answers_are_not_held_back() -> None:
    """Nagle's algorithm is off for the connections that the server takes."""

    async def accepted(listener: socket.socket) -> int:
        connection: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                connection.set_result(transport.get_extra_info("socket"))

        server = await asyncio.get_running_loop().create_server(Protocol, sock=listener)
        async with server:
            with socket.create_connection(listener.getsockname()):
                return (await connection).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    with _bind(ServerConfig(port=0)) as listener:
        assert asyncio.run(accepted(listener)) != 0


def run_serve(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minivllm.serve", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_serve("--port", str(port))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert str(port) in result.stderr
    assert "--port" in result.stderr


RIVAL = """
from dataclasses import replace
bind, rivals = serve._bind, []
def bind_and_lose(config):
    listener = bind(config)
    rivals.append(bind(replace(config, port=listener.getsockname()[1])))
    rivals[0].listen()
    return listener
serve._bind = bind_and_lose
"""
BROKEN_LOOP = """
async def main_loop(self):
    raise RuntimeError("the loop broke")
serve._HttpServer.main_loop = main_loop
"""


def test_of_two_servers_that_start_at_once_one_ends(tiny: tuple[str, ...]) -> None:
    """On Linux both may have the port for as long as neither listens."""
    result = run_patched(RIVAL, *tiny)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "can't listen on 127.0.0.1 port" in result.stderr.splitlines()[-1]


def test_a_server_whose_http_fails_ends(tiny: tuple[str, ...]) -> None:
    result = run_patched(BROKEN_LOOP, *tiny)
    assert result.returncode == 1
    assert result.stderr.endswith("RuntimeError: the loop broke\n")


def test_a_host_that_is_not_there_is_one_line() -> None:
    result = run_serve("--host", "nowhere.invalid")
    assert result.returncode == 1
    assert result.stderr.endswith("; choose another --host\n")


def test_sigterm_during_start_up_is_no_failure(tiny: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "minivllm.serve", "--port", "0", *tiny]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.parent.exists():
            process.kill()
            pytest.skip("finds the engine process in /proc")
        # The engine process is started after signals are listened to.
        wait_until(lambda: bool(children.read_text()))
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read()
    assert process.returncode == 0
    assert "stopped before it could serve" in log or "stopping: 0 requests" in log
    assert "Traceback" not in log


def test_a_model_that_is_not_there_is_one_line() -> None:
    result = run_serve("--model", "/nowhere/model", "--port", "0")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "/nowhere/model" in result.stderr.splitlines()[-1]


def test_what_does_not_fit_says_what_would(tiny: tuple[str, ...]) -> None:
    result = run_serve(*tiny, "--port", "0", "--max-model-len", "4096", "--kv-cache-memory", "40kB")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "--max-model-len" in last
    assert "--kv-cache-memory" in last


def test_start_up_tells_its_stages(embedded_server: Server) -> None:
    log = "".join(embedded_server.log)
    for stage in (
        "torch imported",
        "weights loaded",
        "KV cache",
        "sequences at once",
        "serving",
        EMBEDDED_MODEL,
    ):
        assert stage in log
