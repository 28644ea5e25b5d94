"""What goes wrong around a server: full disks, models that change, signals at bad moments."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.conftest import wait_until
from tests.server.fakes import make_tokenizer
from tests.serving.conftest import Server, run_patched, serving
from tests.serving.test_lifecycle import COMPLETION, Streamed, engine_process, run_serve
from tests.tiny_model import CONFIG, write_tiny_model
from tests.weights.tiny_models import save_tiny_llama

FULL = Path("/dev/full")


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[str, ...]:
    """Flags that serve a model of a few thousand weights."""
    return ("--model", write_tiny_model(tmp_path), "--load-format", "dummy", "--kv-cache-memory", "4MB")


def complete(server: Server) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={**COMPLETION, "max_tokens": 4}, timeout=60)


def logged(server: Server, words: str) -> bool:
    return any(words in line for line in server.log)


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_trace(tiny: tuple[str, ...]) -> None:
    result = run_serve(*tiny, "--port", "0", "--trace", str(FULL))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith("can't write --trace /dev/full: No space left on device")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Nobody can be told, but requests are served; the exit code is as ever."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with FULL.open("w") as full:
        process = start_serve(*tiny, "--port", str(port), stderr=full)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

                def is_ready() -> bool:
                    assert process.poll() is None, f"it ended with code {process.returncode}"
                    try:
                        return client.get("/ready").status_code == 200
                    except httpx.ConnectError:
                        return False

                wait_until(is_ready)
                assert client.post("/v1/completions", json={**COMPLETION, "max_tokens": 4}).status_code == 200
                assert client.post("/v1/completions", content=b"{").status_code == 400
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()


def start_serve(*flags: str, stderr: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "minivllm.serve", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=stderr,  # type: ignore[arg-type]
    )


def test_no_room_for_sockets_is_one_line(tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    result = run_patched("import tempfile; tempfile.tempdir = '/nowhere'", *tiny)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "can't make a folder for the engine's sockets" in result.stderr.splitlines()[-1]


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()  # the server may have mapped it
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def change(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def test_a_model_that_is_broken_when_the_engine_restarts(tmp_path: Path) -> None:
    """Each time a line says what is wrong with it, and once it is whole again there is an engine again."""
    folder = save_tiny_llama(tmp_path / "model", vocab_size=CONFIG["vocab_size"])
    write_byte_tokenizer(folder)
    backup = {path: path.read_bytes() for path in folder.iterdir()}
    faults = {
        "not a readable safetensors file": truncate,
        "the tensors don't fit the configuration": change,
        "malformed JSON": break_config,
    }
    with serving("--model", str(folder), "--kv-cache-memory", "1MB") as server:
        for number, (words, fault) in enumerate(faults.items(), start=1):
            assert complete(server).status_code == 200
            fault(folder)
            os.kill(engine_process(server), signal.SIGKILL)
            wait_until(lambda words=words: logged(server, words))
            answer = complete(server)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_restarting")
            for path, data in backup.items():
                path.unlink()
                path.write_bytes(data)
            wait_until(lambda: httpx.get(f"{server.url}/ready", timeout=30).status_code == 200)
            assert sum("can't be started again" in line for line in server.log) >= number
        assert not logged(server, "Traceback")
        assert server.stop() == 0


def write_byte_tokenizer(folder: Path) -> None:
    make_tokenizer()._backend.save(str(folder / "tokenizer.json"))


def test_sigterm_while_the_engine_restarts(tiny: tuple[str, ...]) -> None:
    with serving(*tiny) as server:
        os.kill(engine_process(server), signal.SIGKILL)
        wait_until(lambda: logged(server, "starting another"))
        assert server.stop() == 0
        assert not logged(server, "Traceback")


def test_sigterm_twice_while_the_engine_restarts(tiny: tuple[str, ...]) -> None:
    with serving(*tiny) as server:
        os.kill(engine_process(server), signal.SIGKILL)
        wait_until(lambda: logged(server, "starting another"))
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) in (0, 1)
        assert not logged(server, "Traceback")


def test_an_engine_that_dies_while_the_server_drains(tiny: tuple[str, ...]) -> None:
    with serving(*tiny, "--shutdown-timeout", "600") as server:
        running = Streamed(server, max_tokens=4000)
        assert running.has_begun.wait(60)
        pid = engine_process(server)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: logged(server, "stopping"))
        os.kill(pid, signal.SIGKILL)
        assert server.process.wait(30) == 0
        running.join()
        error = json.loads([line for line in running.lines if line][-1][6:])["error"]
        assert error["code"] == "engine_dead"
        assert not logged(server, "Traceback")


def test_an_idle_server_with_no_time_to_finish(tiny: tuple[str, ...]) -> None:
    with serving(*tiny, "--shutdown-timeout", "0") as server:
        assert server.stop() == 0
        assert not logged(server, "did not finish")


def test_more_connections_than_a_shell_allows_by_default(tiny: tuple[str, ...]) -> None:
    """The limit on open files that a process begins with is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        server_context = serving(*tiny)
        server = server_context.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with ExitStack() as stack:
        stack.push(server_context)
        port = httpx.URL(server.url).port
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        assert complete(server).status_code == 200
