"""uvicorn's settings, and its HTTP/1.1 protocol: who sends no HTTP is told so, who sends nothing must go."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from http import HTTPStatus

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

from minivllm.config import ServerConfig
from minivllm.errors import HeadersTooLargeError, InvalidRequestError, SlowRequestError
from minivllm.server import refusal
from minivllm.server.errors import envelope

REQUEST_SECONDS = 60.0
"""How long a request's head may take from its first byte or, on a new connection, from the connection on; and
how long its body may pause."""

KEEP_ALIVE_SECONDS = 75
"""How long a connection may be idle between two requests: longer than most clients and proxies would use it,
so that it isn't closed while a request is on its way."""


def uvicorn_config(app: ASGIApp, config: ServerConfig, timeout_graceful_shutdown: int) -> uvicorn.Config:
    """How uvicorn serves ``app``. The TLS files have been checked before (``tls.py``)."""
    return uvicorn.Config(
        app,
        http=Http11,  # always h11: the parser that uvicorn prefers, where it is installed, has no limits
        ws="none",
        lifespan="off",
        proxy_headers=False,  # nothing here looks at a client's address, or believes a header about it
        log_config=None,
        access_log=False,
        h11_max_incomplete_event_size=config.max_header_size,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_NONE if config.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=timeout_graceful_shutdown,
    )


class Http11(H11Protocol):
    """uvicorn's protocol, but a malformed request gets an envelope, 431 where it was too large, and 408 where
    the rest of it doesn't come: connections that nobody uses mustn't add up.
    """

    _is_refused = False
    _request_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the transport."""
        super().connection_made(transport)
        self._time_request()

    def data_received(self, data: bytes) -> None:
        """Called by the transport."""
        if not self._is_refused:
            super().data_received(data)
            self._time_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport."""
        self._stop_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Called by uvicorn. It stops reading where a further request has come before this one's answer, and
        then wouldn't hear of a client that leaves: so that is read too, up to a limit.
        """
        super().handle_events()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Called by uvicorn. The next request may have begun to arrive before this one was answered."""
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
            self._time_request()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's error."""
        error = InvalidRequestError("this is not a valid HTTP request")
        if getattr(sys.exc_info()[1], "error_status_hint", None) == HeadersTooLargeError.http_status:
            size = self.config.h11_max_incomplete_event_size
            error = HeadersTooLargeError(f"a request's head must have at most {size} bytes, got more")
        self._refuse(error)

    def _time_request(self) -> None:
        state = self.conn.their_state
        if state is not h11.IDLE:
            self._stop_timer()
        if self._request_timer is None and state in (h11.IDLE, h11.SEND_BODY):
            self._request_timer = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # nothing has come that an answer could be to
        elif not self._is_refused:
            self._refuse(
                SlowRequestError(f"the rest of the request didn't come within {REQUEST_SECONDS:g} s")
            )

    def _refuse(self, error: InvalidRequestError) -> None:
        self._is_refused = True
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer is under way already, and can't be finished
            return
        body = json.dumps(envelope(error)).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        reason = HTTPStatus(error.http_status).phrase
        events = (
            h11.Response(status_code=error.http_status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        if self.cycle is not None and not self.cycle.response_complete:
            # The rest of its body was awaited: to the application the client has left, with this answer.
            self.cycle.scope["state"]["refusal"] = error
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        # Not at once: see refusal.py.
        self.loop.call_later(refusal.LINGER_SECONDS, self.transport.close)
