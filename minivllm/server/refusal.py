"""Refusing a request whose body may still be on its way, so that the client gets to read why."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from starlette.types import Receive, Scope, Send

from minivllm.errors import MinivllmError
from minivllm.server.errors import error_response
from minivllm.server.record import record_of

LINGER_SECONDS = 2.0
"""How long what a refused client is still sending is read, and dropped, before its connection closes."""


async def refuse(
    error: MinivllmError, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str] | None = None
) -> None:
    """Answer with ``error``, and with ``headers`` besides its own; of the body nothing is kept.

    The connection closes after it, unless the request has no body.
    """
    record_of(scope).note_error(error)
    response = error_response(error)
    response.headers.update(headers or {})
    if not _has_body(scope):
        await response(scope, receive, send)
        return
    response.headers["Connection"] = "close"
    await send(
        {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    )
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    # The answer is out, but closing a connection with unread input resets it, and a client that is
    # still sending would see the reset instead of the answer. So its bytes are dropped for a while.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_drop_rest(receive), LINGER_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


async def _drop_rest(receive: Receive) -> None:
    has_more = True
    while has_more:
        has_more = (await receive()).get("more_body", False)
