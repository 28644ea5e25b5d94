"""Errors as OpenAI sends them: ``{"error": {"message", "type", "param", "code"}}``, whatever went wrong.

Everything that a client can do wrong becomes an :class:`InvalidRequestError` first, those that pydantic
and Starlette find included, so that there is one way from an error to an answer.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from minivllm.errors import InvalidRequestError, MinivllmError
from minivllm.server.record import record_of
from minivllm.server.responses import ErrorEnvelope

MAX_MESSAGE_CHARS = 1000
"""Longer messages are cut: a client's megabytes are not sent back to it."""

_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "one of {expected}",
    "int_parsing": "an integer",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": "a string that matches {pattern}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}
"""By pydantic's type of error, what the value should have been."""


def envelope(error: Exception) -> ErrorEnvelope:
    """The answer's body for ``error``. The details of what isn't ours are for the log alone."""
    if not isinstance(error, MinivllmError):
        error = MinivllmError("internal error: the server's log says more")
    message = error.message
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[:MAX_MESSAGE_CHARS] + " …"
    param = error.param if isinstance(error, InvalidRequestError) else None
    return {"error": {"message": message, "type": error.type, "param": param, "code": error.code}}


def error_response(error: Exception, *, status_code: int | None = None) -> JSONResponse:
    """The whole answer for ``error``, with its own status unless another is given."""
    own_status, headers = 500, {}
    if isinstance(error, MinivllmError):
        own_status = error.http_status
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(envelope(error), status_code=status_code or own_status, headers=headers)


def unknown_route(scope: Scope) -> InvalidRequestError:
    """For a path that leads nowhere, with the status 404."""
    return InvalidRequestError(f"unknown route {scope['method']} {scope['path']}")


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app`` an envelope."""

    async def handle(request: Request, error: Exception) -> Response:
        record_of(request.scope).note_error(error)
        return error_response(error)

    async def handle_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await handle(request, _as_invalid_request(error.errors()))

    async def handle_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        # Not request.url: that is put together from the Host header, which is the client's.
        refusal = InvalidRequestError(error.detail)
        if error.status_code == 404:
            refusal = unknown_route(request.scope)
        if error.status_code == 405:
            refusal = InvalidRequestError(f"{request.scope['path']} does not take {request.method}")
        record_of(request.scope).note_error(refusal)
        return JSONResponse(envelope(refusal), status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(MinivllmError, handle)
    app.add_exception_handler(RequestValidationError, handle_validation)
    app.add_exception_handler(HTTPException, handle_http)
    app.add_exception_handler(Exception, handle)


def _as_invalid_request(errors: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """The first of pydantic's errors, in words that name the field and the given value."""
    error = errors[0]
    kind, location, given = error["type"], error["loc"], error["input"]
    param = _path(location)
    if kind == "value_error":  # raised in protocol.py, its message ready
        cause = error["ctx"]["error"]
        assert isinstance(cause, InvalidRequestError)
        return InvalidRequestError(cause.message, param=".".join(filter(None, (param, cause.param))))
    if kind == "missing":
        message = f"{param} is required" if param else "the body must be a JSON object, got nothing"
        return InvalidRequestError(message, param=param)
    if isinstance(given, bytes):  # FastAPI leaves a body alone that doesn't say it is JSON
        return InvalidRequestError(
            "the body must be JSON, and come with the header Content-Type: application/json"
        )
    expected = _EXPECTED[kind].format(**error.get("ctx", {})) if kind in _EXPECTED else error["msg"]
    got = f"one of {len(given)}" if kind == "too_long" else reprlib.repr(given)
    return InvalidRequestError(f"{param or 'the body'} must be {expected}, got {got}", param=param)


def _path(location: Sequence[int | str]) -> str | None:
    """``("body", "messages", 0, "content", "<parts>", 1)`` → ``"messages[0].content[1]"``."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):  # in angle brackets: a union's branch, no name of a field
            path += f".{part}" if path else part
    return path or None
