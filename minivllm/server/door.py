"""What a request passes before it reaches a route: id, record, CORS, head, key, body, path, waiting room.

The id comes first, so that every answer carries one, and the record second, so that none is left out. CORS
comes before the key: a browser asks for leave before it sends the key, and must be able to read a 401. The
body is read only from those who may send one, and only who has sent it all may wait.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.config import ServerConfig, format_size
from minivllm.errors import HeadersTooLargeError
from minivllm.server.admission import AdmissionMiddleware, WaitingRoom
from minivllm.server.auth import ApiKeyMiddleware
from minivllm.server.body import BodyLimitMiddleware
from minivllm.server.errors import error_response, unknown_route
from minivllm.server.keys import ApiKeys
from minivllm.server.rate_limit import TokenRateLimit
from minivllm.server.record import OnRequestEnd, RecordMiddleware, record_of
from minivllm.server.refusal import refuse
from minivllm.server.request_id import HEADER, RequestIdMiddleware

logger = logging.getLogger(__name__)


def guard(
    app: ASGIApp,
    config: ServerConfig,
    api_keys: ApiKeys | None,
    room: WaitingRoom,
    rate_limit: TokenRateLimit | None,
    on_request_end: Sequence[OnRequestEnd],
) -> ASGIApp:
    """``app`` behind the checks that ``config`` asks for."""
    app = PathMiddleware(AdmissionMiddleware(FailureLogMiddleware(app), room, rate_limit))
    app = BodyLimitMiddleware(app, config.max_body_size)
    if api_keys is not None:
        app = ApiKeyMiddleware(app, api_keys)
    app = HeadLimitMiddleware(app, config.max_header_size, config.max_header_count)
    if config.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=[HEADER],
        )
    return RequestIdMiddleware(RecordMiddleware(app, on_request_end))


class FailureLogMiddleware:
    """Logs an error that nobody foresaw, once its 500 is out.

    Starlette raises it on, for the server to log; but uvicorn then closes the connection, on which the client
    may be sending its next request already.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection as ASGI has it."""
        is_answered = False

        async def send_and_notice(message: Message) -> None:
            nonlocal is_answered
            await send(message)
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, send_and_notice)
        except Exception:
            if not is_answered:
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])


class PathMiddleware:
    """Answers 404 to paths with control characters, for which there is no route.

    Starlette's patterns end in ``$``, which lets a line break pass that nobody else here takes for nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection as ASGI has it."""
        if scope["type"] != "http" or re.search(r"[\x00-\x1f\x7f]", scope["path"]) is None:
            await self.app(scope, receive, send)
            return
        error = unknown_route(scope)
        record_of(scope).note_error(error)
        await error_response(error, status_code=404)(scope, receive, send)


class HeadLimitMiddleware:
    """Answers 431 to requests with a head of more than ``max_size`` bytes or ``max_count`` header lines.

    The HTTP parser stops at ``max_size`` too (``http11.py``), but only where a head comes in several reads.
    """

    def __init__(self, app: ASGIApp, max_size: int, max_count: int) -> None:
        self.app = app
        self.max_size = max_size
        self.max_count = max_count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection as ASGI has it."""
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await refuse(error, scope, receive, send)

    def _error(self, scope: Scope) -> HeadersTooLargeError | None:
        headers = scope["headers"]
        if len(headers) > self.max_count:
            return HeadersTooLargeError(
                f"a request must have at most {self.max_count} header lines, got {len(headers)}"
            )
        # As sent: a first line of method, target and "HTTP/1.1", then "name: value" each, and an empty line.
        target = len(scope.get("raw_path") or b"") + len(scope["query_string"]) + bool(scope["query_string"])
        size = len(scope["method"]) + target + 12 + sum(len(n) + len(v) + 4 for n, v in headers) + 2
        if size > self.max_size:
            limit = f"{self.max_size} bytes ({format_size(self.max_size)})"
            return HeadersTooLargeError(f"a request's head must have at most {limit}, got {size}")
        return None
