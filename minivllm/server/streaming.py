"""Work for a client that may leave: it stops when the client does, whether it streams or not."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minivllm.errors import MinivllmError
from minivllm.server.errors import envelope
from minivllm.server.record import RequestRecord, record_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

Emit = Callable[[Mapping[str, object]], Awaitable[None]]
"""Sends one event to the client."""


async def run_all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, run at once. If one raises, or this is cancelled, none is left running."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``; None if the client left before, and then ``work`` has been cancelled.

    To call when the request's body has been read: all that ``receive`` can still bring is the disconnect.
    """
    task = asyncio.create_task(work)
    disconnect = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _cancel((task, disconnect))


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel what still runs, and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _escape_line_breaks(data: str) -> str:
    """JSON without the line breaks that it may have in strings: to some clients they end an event's line."""
    data = data.replace("\x85", "\\u0085")
    return data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


class EventStream(Response):
    """A response of server-sent events, written by ``produce`` through the function that it is given.

    A stream that ``produce`` finishes ends with ``[DONE]``. The status is out when ``produce`` starts, so
    what it raises becomes an event that holds the error, and no ``[DONE]`` follows.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[Emit], Coroutine[Any, Any, None]]) -> None:
        self.status_code = 200
        self.background = None
        self.produce = produce
        # No proxy may hold events back.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response as ASGI has it."""
        await run_until_disconnect(receive, self._send_events(record_of(scope), send))

    async def _send_events(self, record: RequestRecord, send: Send) -> None:
        lock = asyncio.Lock()  # ASGI doesn't say that two tasks may send at once, and samples do

        async def send_data(data: str) -> None:
            body = f"data: {data}\n\n".encode()
            async with lock:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        async def emit(event: Mapping[str, object]) -> None:
            data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
            await send_data(_escape_line_breaks(data))

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self.produce(emit)
        except Exception as error:
            if not isinstance(error, MinivllmError):
                logger.exception("a stream failed")
            record.note_error(error)
            await emit(envelope(error))
        else:
            await send_data("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
