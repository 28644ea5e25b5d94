"""Servers and other programs that a benchmark starts, and ends again whatever happens."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from minivllm.errors import MinivllmError

START_SECONDS = 600.0
"""A server that isn't ready by then counts as failed."""


class ContenderError(MinivllmError):
    """Something to measure that can't be started, or that didn't do what it was asked to."""


class Process:
    """A child process whose standard error is kept, for when it fails."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self.command = list(command)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.child = subprocess.Popen(self.command, stderr=self._log, **options)
        except OSError as error:
            raise ContenderError(f"can't be started: {error}") from error

    @property
    def has_ended(self) -> bool:
        """Whether it has, by itself."""
        return self.child.poll() is not None

    def failed(self, what: str = "it ended or didn't get ready") -> ContenderError:
        """Stop it; the error has the last lines that it wrote, or what it called an error itself."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-3:]
        lines = [line for line in lines if "error: " in line] or lines
        self.stop()
        return ContenderError("; ".join([what, *lines]))

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that doesn't help."""
        self.child.terminate()
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self._log.close()


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers."""

    url: str
    """Up to, and without, ``/v1``."""
    process: Process
    start_seconds: float


def start_server(command: Sequence[str], env: dict[str, str] | None = None) -> Server:
    """Start ``command --port PORT`` and wait until ``/health`` says 200. Raises ContenderError."""
    port = _free_port()
    started = time.monotonic()
    process = Process([*command, "--port", str(port)], stdout=subprocess.DEVNULL, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_healthy(url):
            if process.has_ended or time.monotonic() > started + START_SECONDS:
                raise process.failed()
            time.sleep(0.1)
    except BaseException:  # also Ctrl-C and SIGTERM: nobody else knows of this process yet
        process.stop()
        raise
    return Server(url, process, time.monotonic() - started)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:  # refused, or 503 while it loads
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
