"""Request bodies: how large they may be, and what counts as JSON."""

from __future__ import annotations

import gc
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.config import format_size
from minivllm.errors import BodyTooLargeError
from minivllm.server.refusal import refuse


class BodyLimitMiddleware:
    """Answers 413 to bodies over ``max_body_size`` bytes, and hands the app the others whole.

    A body is refused as soon as its Content-Length says so, or, without one, as soon as it has grown too
    large: never more than ``max_body_size`` bytes are kept.
    """

    def __init__(self, app: ASGIApp, max_body_size: int) -> None:
        self.app = app
        self.max_body_size = max_body_size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = int(dict(scope["headers"]).get(b"content-length", b"0"))
        if announced > self.max_body_size:
            await self._refuse(scope, receive, send)
            return
        chunks: list[bytes] = []
        size, has_more = 0, True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            has_more = message.get("more_body", False)
            if size > self.max_body_size:
                await self._refuse(scope, receive, send)
                return
        unread: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]
        chunks.clear()

        async def receive_whole() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_whole, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = f"{self.max_body_size} bytes ({format_size(self.max_body_size)})"
        await refuse(BodyTooLargeError(f"the body must have at most {limit}, got more"), scope, receive, send)


class JsonRequest(Request):
    """A request whose body is parsed by pydantic's parser instead of Python's.

    It refuses what Python's lets through (NaN, lone surrogates), limits nesting, and is several times
    faster on long lists of token ids, which matters on the event loop.
    """

    async def json(self) -> Any:
        """The parsed body. Raises ``HTTPException`` (400 or 415), which FastAPI passes on as it is."""
        encoding = self.headers.get("content-encoding", "identity")
        if encoding != "identity":
            message = f"the body must not be compressed, got Content-Encoding: {encoding[:80]}"
            raise HTTPException(415, message)
        content = await self.body()
        # JSON has no cycles, and looking for some among millions of new lists takes longer than making them.
        gc_was_enabled = gc.isenabled()
        gc.disable()
        try:
            return from_json(content, allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}") from error
        finally:
            if gc_was_enabled:
                gc.enable()


class JsonRoute(APIRoute):
    """A route that takes :class:`JsonRequest`."""

    request_class: type[JsonRequest] = JsonRequest

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook for requests of one's own class."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(self.request_class(request.scope, request.receive))

        return handle_json
