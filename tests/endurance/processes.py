"""A server and its engine as the operating system sees them, and the server's own count of its tasks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.serving.conftest import Server, serving
from tests.tiny_model import CONFIG

COUNTS_VARIABLE = "ENDURANCE_COUNTS"
"""Names the file that the server writes its counts to (``counting_server.py``)."""
_ENGINE_MODULE = "minivllm.engine.process"
_REQUEST_TASK = "RequestResponseCycle.run_asgi"  # uvicorn's
_SETTLE_SECONDS = 10.0
_SETTLE_PAUSE = 0.2


@dataclass
class Endured:
    """A running server with a folder of its own for temporary files."""

    server: Server
    folder: Path
    """Where its temporary files are, sockets included: ``$TMPDIR``."""
    counts_path: Path
    start_seconds: float
    """From the command to the log line that it serves."""
    num_memory_blocks: int = 0
    """Of the server's Python objects, when it last counted."""

    @property
    def port(self) -> int:
        """Of the server."""
        return httpx.URL(self.server.url).port or 0

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self.server.process.pid

    def engine_pid(self) -> int | None:
        """Of the engine's process, if there is one at this moment."""
        for child in children(self.pid):
            if _ENGINE_MODULE.encode() in _read(f"/proc/{child}/cmdline"):
                return child
        return None

    def counts(self) -> dict[str, Any]:
        """Tasks, threads and open files of the server and threads and open files of the engine.

        Without the threads that asyncio keeps for ``to_thread``: it starts them as it needs them, up to a
        number of its own, and they stay.
        """
        self.counts_path.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        end = time.monotonic() + 30
        while not self.counts_path.exists():
            if time.monotonic() > end:
                raise TimeoutError("the server doesn't count its tasks")
            time.sleep(0.01)
        counts: dict[str, Any] = json.loads(self.counts_path.read_text())
        self.num_memory_blocks = counts.pop("memory blocks")
        counts["threads"] = num_threads(self.pid) - counts.pop("pooled threads")
        counts["open files"] = num_files(self.pid)
        engine = self.engine_pid()
        if engine is not None:
            counts["engine threads"], counts["engine open files"] = num_threads(engine), num_files(engine)
        return counts

    async def counts_at_rest(self) -> dict[str, Any]:
        """The counts once no request is under way and they are the same twice.

        A client has its answer before the server has put all away. Raises TimeoutError.
        """
        last = None
        for _ in range(round(_SETTLE_SECONDS / _SETTLE_PAUSE)):
            counts = await asyncio.to_thread(self.counts)
            if counts == last and _REQUEST_TASK not in counts["tasks"]:
                return counts
            last = counts
            await asyncio.sleep(_SETTLE_PAUSE)
        raise TimeoutError(f"the server isn't at rest after {_SETTLE_SECONDS:g} s: {last}")

    async def counts_settled(self, expected: dict[str, Any]) -> dict[str, Any]:
        """The counts that have names in ``expected``, once they are as there; after 10 s as they are."""
        for _ in range(round(_SETTLE_SECONDS / _SETTLE_PAUSE)):
            counts = await asyncio.to_thread(self.counts)
            counts = {name: counts.get(name) for name in expected}
            if counts == expected:
                break
            await asyncio.sleep(_SETTLE_PAUSE)
        return counts

    def sockets_left(self) -> list[str]:
        """Folders of sockets that are there."""
        return sorted(path.name for path in self.folder.glob("minivllm-*"))


@contextmanager
def endured_server(*flags: str, hidden_size: int = 32, num_layers: int = 2) -> Iterator[Endured]:
    """Serve a Llama of random weights; its processes count what they hold."""
    with TemporaryDirectory(prefix="endure-") as folder:
        model = Path(folder) / "model"
        model.mkdir()
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
        }
        (model / "config.json").write_text(json.dumps(CONFIG | sizes))
        before = {name: os.environ.get(name) for name in ("TMPDIR", COUNTS_VARIABLE)}
        temporary, counts_path = Path(folder) / "tmp", Path(folder) / "counts.json"
        temporary.mkdir()
        os.environ.update({"TMPDIR": str(temporary), COUNTS_VARIABLE: str(counts_path)})
        start = time.monotonic()
        try:
            with serving(
                "--model",
                str(model),
                "--load-format",
                "dummy",
                *flags,
                python=("-m", "tests.endurance.counting_server"),
            ) as server:
                yield Endured(server, temporary, counts_path, time.monotonic() - start)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def children(pid: int) -> list[int]:
    """Processes that this one has started and that live."""
    return [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]


def is_running(pid: int) -> bool:
    """Whether there is such a process, one that has ended and wasn't waited for left out."""
    stat = _read(f"/proc/{pid}/stat")
    return bool(stat) and stat.rpartition(b")")[2].split()[0] != b"Z"


def resident_bytes(pid: int) -> int:
    """Memory of a process; 0 where there is none."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def num_threads(pid: int) -> int:
    """Threads of a process."""
    return len(os.listdir(f"/proc/{pid}/task"))


def num_files(pid: int) -> int:
    """Open files of a process, sockets among them."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # it has just ended
        return b""
