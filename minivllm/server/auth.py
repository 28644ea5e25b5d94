"""The check of API keys. It knows no routes: whatever is not one of three exact paths needs a key."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from minivllm.errors import InvalidApiKeyError
from minivllm.server.keys import ApiKeys
from minivllm.server.refusal import refuse

PUBLIC_PATHS = frozenset({b"/health", b"/ping", b"/ready"})
"""Compared with the path's bytes as they were sent, before anything is decoded or normalised: another
spelling, even one that a router or a proxy might take for the same path, needs a key."""


class ApiKeyMiddleware:
    """Answers 401 to requests without a key, before their body is read; WebSockets are closed."""

    def __init__(self, app: ASGIApp, api_keys: ApiKeys) -> None:
        self.app = app
        self.api_keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection as ASGI has it."""
        if scope["type"] == "lifespan" or scope.get("raw_path") in PUBLIC_PATHS:
            await self.app(scope, receive, send)
            return
        reason = self._reason_to_refuse(scope)
        if reason is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = {"WWW-Authenticate": "Bearer"}
            await refuse(InvalidApiKeyError(reason), scope, receive, send, headers)
        else:
            await send({"type": "websocket.close", "code": 1008})  # policy violation

    def _reason_to_refuse(self, scope: Scope) -> str | None:
        """None for a request with a key, whose name is then ``request.state.key_name``."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if not values:
            return "an API key is required, in the header Authorization: Bearer KEY"
        if len(values) > 1:
            return f"one Authorization header is expected, got {len(values)}"
        scheme, _, key = values[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return "the Authorization header must have the form Bearer KEY"
        name = self.api_keys.name_of(key.strip(b" "))
        if name is None:
            return "this API key is not known here"
        scope.setdefault("state", {})["key_name"] = name
        return None
