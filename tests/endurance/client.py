"""A client that can be rude: it sends any bytes, leaves at any moment, and notes when what came.

One connection for each request. Answers are parsed when all is there.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

COMPLETIONS = "/v1/completions"


@dataclass
class Answer:
    """What came back, and when, by ``time.monotonic()``."""

    sent: float
    first_text: float | None = None
    """When the first event, or the whole answer, began to arrive."""
    finished: float = 0.0
    has_left: bool = False
    """Whether the client went away before the end."""
    status: int | None = None
    retry_after: str | None = None
    body: bytes = b""
    is_whole: bool = False
    """Whether HTTP says that nothing is missing."""

    @property
    def is_complete(self) -> bool:
        """Whether it is a completion with all that belongs to it."""
        if self.status != 200 or not self.is_whole:
            return False
        return self.body.endswith(b"data: [DONE]\n\n") or b'"usage":' in self.body

    @property
    def outcome(self) -> str:
        """One word or two: ``complete``, ``left``, ``503 overloaded``, ``engine_dead``, ``cut off``."""
        if self.is_complete:
            return "complete"
        if self.has_left:
            return "left"
        if self.status is None or not self.is_whole:
            return "cut off"
        code = self._error_code()
        return code if self.status == 200 else f"{self.status} {code}"

    def json(self) -> Any:
        """A whole answer's body."""
        return json.loads(self.body)

    def _error_code(self) -> str:
        lines = [line.removeprefix(b"data: ") for line in self.body.splitlines() if line]
        try:
            error = json.loads(lines[-1])["error"]
            return str(error["code"] or error["type"])
        except (IndexError, ValueError, KeyError, TypeError):
            return "without an envelope"


class _Received:
    """As much of a socket as ``HTTPResponse`` wants."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def request_head(path: str, num_bytes: int, headers: str = "") -> bytes:
    """Of a POST of JSON."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"{headers}Content-Length: {num_bytes}\r\n\r\n"
    ).encode()


async def post(
    port: int, body: Mapping[str, Any], *, path: str = COMPLETIONS, leave_after: float | None = None
) -> Answer:
    """Send a request as JSON; leave after so many seconds, whatever is there by then."""
    content = json.dumps(body).encode()
    return await send(port, request_head(path, len(content)) + content, leave_after=leave_after)


async def get(port: int, path: str) -> Answer:
    """Get a page."""
    return await send(port, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())


async def send(
    port: int, request: bytes, *, leave_after: float | None = None, resets: bool = False
) -> Answer:
    """Send any bytes, and read to the end of the connection.

    Args:
        leave_after: seconds after which the client closes the connection.
        resets: it closes it as a process does that is killed with data unread.
    """
    answer, received = Answer(time.monotonic()), bytearray()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        answer.finished = time.monotonic()
        return answer
    try:
        writer.write(request)
        await asyncio.wait_for(_read(reader, received, answer), leave_after)
    except TimeoutError:
        answer.has_left = True
    except OSError:
        pass
    finally:
        answer.finished = time.monotonic()
        if resets:
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        writer.transport.abort()
    _parse(bytes(received), answer)
    return answer


async def _read(reader: asyncio.StreamReader, received: bytearray, answer: Answer) -> None:
    while data := await reader.read(2**16):
        received += data
        if answer.first_text is None and b"\r\n\r\n" in received and b'"text"' in received:
            answer.first_text = time.monotonic()


def _parse(received: bytes, answer: Answer) -> None:
    response = HTTPResponse(_Received(received))  # type: ignore[arg-type]
    try:
        response.begin()
        answer.status, answer.retry_after = response.status, response.getheader("Retry-After")
        answer.body = response.read()
        answer.is_whole = True
    except (HTTPException, OSError, ValueError):
        pass


async def until_idle(port: int, *, seconds: float = 60.0) -> dict[str, Any]:
    """The health report once no request is left. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = await get(port, "/health")
        if answer.status is not None:
            health: dict[str, Any] = answer.json()
            if health["num_running"] == health["num_waiting"] == 0:
                return health
        await asyncio.sleep(0.05)
    raise TimeoutError(f"the server is busy after {seconds:g} s still: {health}")
