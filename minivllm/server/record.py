"""What became of one HTTP request: written while it is served, handed out when its answer is over.

The request log, the metrics and the spans are all made from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minivllm.errors import DeadlineError, MinivllmError
from minivllm.request import CompletionOutput, RequestMetrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_CLOSED_REQUEST = 499  # nginx's number: nobody is left to read it but the log
UNKNOWN_ROUTE = "unknown"


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request. Moments are seconds of ``time.monotonic``, which is the engine's clock, too."""

    request_id: str
    """What its answer has in ``X-Request-Id``."""
    method: str
    path: str
    """As it came, decoded."""
    traceparent: str | None = None
    """The header, as it came: which trace the client wants this in."""
    received_at: float = field(default_factory=time.monotonic)
    """When its head was there."""
    unix_time: float = field(default_factory=time.time)
    """The same moment, in seconds since 1970."""
    ended_at: float = 0.0
    """When the last of its answer was handed to the network, or the client had left."""
    route: str = UNKNOWN_ROUTE
    """The path as the application declares it: there are only so many of them."""
    status: int | None = None
    """That was sent, if one was."""
    is_complete: bool = False
    """Whether the whole answer was sent."""
    key_name: str | None = None
    """Which of the server's API keys it came with, such as ``key-1``."""
    error: str | None = None
    """The code, or else the type, of the error that it was answered with."""
    answer_id: str | None = None
    """The ``id`` in its answer, with which the engine's request ids begin."""
    model: str | None = None
    is_streamed: bool | None = None
    num_samples: int = 0
    """Per prompt."""
    max_tokens: int | None = None
    """Most that a sample may have."""
    prompt_lengths: list[int] = field(default_factory=list)
    """In tokens."""
    prompts: list[str] | None = None
    """As the model sees them; kept where the operator asked for it."""
    outputs: dict[int, CompletionOutput] = field(default_factory=dict)
    """By sample: what it has brought so far."""

    @property
    def client_left(self) -> bool:
        """Whether the client closed the connection before its answer was complete."""
        return self.status == CLIENT_CLOSED_REQUEST or not self.is_complete

    @property
    def num_output_tokens(self) -> int:
        """Of all samples."""
        return sum(len(output.token_ids) for output in self.outputs.values())

    @property
    def num_cached_tokens(self) -> int:
        """Of each prompt once: those that its first sample found in the prefix cache."""
        firsts = self.sorted_outputs[:: max(1, self.num_samples)]
        return sum(output.metrics.num_cached_tokens for output in firsts)

    @property
    def finish_reasons(self) -> list[str]:
        """Why each sample ended; those that did not by themselves end with this request."""
        unfinished = "timeout" if self.error == DeadlineError.code else "error"
        unfinished = "abort" if self.client_left else unfinished
        reasons = [output.finish_reason for output in self.sorted_outputs]
        return [unfinished if reason is None else reason.value for reason in reasons]

    @property
    def sorted_outputs(self) -> list[CompletionOutput]:
        """In the order of the samples."""
        return [self.outputs[index] for index in sorted(self.outputs)]

    def phases(self, times: RequestMetrics) -> dict[str, tuple[float, float]]:
        """Beginning and end of a sample's queue, prefill and decode, as far as they are known.

        The engine tells a sample's times with its first token; of its end it tells nothing where the server
        broke it off, for a stop string or because the client left. It then ended with this request.
        """
        if not times.first_token_time:
            return {}
        return {
            "queue": (times.arrival_time, times.first_scheduled_time),
            "prefill": (times.first_scheduled_time, times.first_token_time),
            "decode": (times.first_token_time, times.finished_time or self.ended_at),
        }

    def note_error(self, error: Exception) -> None:
        """Keep what kind of error it is. Not its message, which may show what the client sent."""
        known = error if isinstance(error, MinivllmError) else MinivllmError("")
        self.error = known.code or known.type


OnRequestEnd = Callable[[RequestRecord], None]
"""Called once for each HTTP request, on the event loop."""


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that ``scope`` is part of."""
    record: RequestRecord = scope["state"]["record"]
    return record


class RecordMiddleware:
    """Gives every HTTP request a record, in ``request.state.record``, and hands it out at the end."""

    def __init__(self, app: ASGIApp, on_end: Sequence[OnRequestEnd]) -> None:
        self.app = app
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        traceparent = headers.get(b"traceparent")
        record = RequestRecord(
            scope["state"]["given_id"] or scope["state"]["unique_id"],
            scope["method"],
            scope["path"],
            traceparent=None if traceparent is None else traceparent.decode("latin-1"),
        )
        scope["state"]["record"] = record

        async def send_and_notice(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)
            if message["type"] == "http.response.body":
                record.is_complete = not message.get("more_body", False)

        try:
            await self.app(scope, receive, send_and_notice)
        except Exception:
            record.status = record.status or 500  # which the server sends, outside of here
            raise
        finally:
            record.ended_at = time.monotonic()
            record.key_name = scope["state"].get("key_name")
            record.route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            refusal = scope["state"].get("refusal")  # the server's own answer, of which ASGI knows nothing
            if refusal is not None:
                record.note_error(refusal)
                record.status, record.is_complete = refusal.http_status, True
            record.status = record.status or CLIENT_CLOSED_REQUEST
            for end in self.on_end:
                end(record)
