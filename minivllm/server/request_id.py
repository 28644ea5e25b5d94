"""Request ids: one in every answer's ``X-Request-Id``, and before every log line of that request."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"

_current: ContextVar[str | None] = ContextVar("request_id", default=None)


class RequestIdMiddleware:
    """Sends back the client's id; a fresh one where it has none, several, or one that doesn't fit a log line.

    The route finds an id that is always fresh and unique in ``request.state.unique_id``. Where the client
    gave none, that is also the one it gets back.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        unique_id = uuid.uuid4().hex
        scope.setdefault("state", {})["unique_id"] = unique_id
        request_id = _given_id(scope) or unique_id
        # Never taken back: the server logs what the application raises after all of this has returned, in
        # the same task. The next request has a task of its own, and sets its own.
        _current.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (HEADER.lower().encode(), request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_id)


def current_request_id() -> str | None:
    """What the client calls the HTTP request in whose course this is called; None where there is none."""
    return _current.get()


class RequestIdFilter(logging.Filter):
    """Gives each log record the id of the request in whose course it came about, as ``request``."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets everything pass."""
        request_id = _current.get()
        if request_id is not None:
            record.request = f"[{request_id}] "
        return True


def _given_id(scope: Scope) -> str | None:
    name = HEADER.lower().encode()
    given = [value for header, value in scope["headers"] if header == name]
    # Visible ASCII only: no line breaks, and no spaces, after which a client could write a log line's text.
    if len(given) != 1 or re.fullmatch(rb"[!-~]{1,128}", given[0]) is None:
        return None
    id: str = given[0].decode("ascii")
    return id
