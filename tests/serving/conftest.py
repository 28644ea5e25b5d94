"""A real server in a process of its own, started and stopped as an operator would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"


@dataclass
class Server:
    """A running ``minivllm serve``."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]

    def health(self) -> dict[str, object]:
        return httpx.get(f"{self.url}/health", timeout=30).json()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextmanager
def serving(*flags: str, python: tuple[str, ...] = ()) -> Iterator[Server]:
    """Start a server on a free port, wait until it listens, and stop it in the end."""
    roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, *python, "-m", "minivllm.serve", "--port", "0", *flags],
        env={**os.environ, "PYTHONPATH": roots},
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if match := re.search(r"serving .* on (https?://\S+) after", line):
                break
        else:
            pytest.fail(f"the server ended with code {process.wait()}:\n{''.join(log)}")
        reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
        reader.start()
        yield Server(match[1], process, log)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=60)


def run_patched(patch: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """``minivllm serve`` after ``patch`` has been executed with ``serve``, its module."""
    script = f"import sys; from minivllm import cli, serve\n{patch}\nsys.exit(cli.run('serve', sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", script, "--port", "0", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture(scope="session")
def embedded_server() -> Iterator[Server]:
    """The embedded model served with default flags, once for all tests that don't change it."""
    with serving() as server:
        yield server
        assert server.health()["kv_cache_usage"] == 0.0
