"""``--request-log``: a line of JSON for each HTTP request, when its answer is over.

No prompts, unless asked for (``--log-prompts``); no answers, no keys, and no error messages, which may show
what a client sent.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
from datetime import UTC, datetime

from minivllm.errors import ConfigError
from minivllm.server.record import UNKNOWN_ROUTE, RequestRecord

QUIET_ROUTES = frozenset({"/health", "/ping", "/ready", "/metrics"})
"""Asked every few seconds by machines: only what isn't a 200 is worth a line."""


class RequestLog:
    """Writes the lines to a file, or, for ``-``, to standard output.

    A file that is moved away (logrotate) is opened anew. One that can't be written to any more costs the
    lines, and an error in the server's log, but no request.
    """

    def __init__(self, path: str) -> None:
        """Raises :class:`ConfigError` for a file that can't be opened."""
        try:
            self._handler = (
                logging.StreamHandler(sys.stdout)
                if path == "-"
                else logging.handlers.WatchedFileHandler(path, encoding="utf-8")
            )
        except OSError as error:
            raise ConfigError(f"can't write --request-log {path}: {error.strerror}") from None

    def __call__(self, record: RequestRecord) -> None:
        """Write the line of ``record``."""
        if record.route not in QUIET_ROUTES or record.status != 200:
            self._handler.handle(logging.makeLogRecord({"msg": json.dumps(describe(record))}))

    def close(self) -> None:
        """Flush and close."""
        self._handler.flush()
        if isinstance(self._handler, logging.FileHandler):
            self._handler.close()


def describe(record: RequestRecord) -> dict[str, object]:
    """What a line has. Of several samples, times are the slowest one's; what isn't known is null."""
    came = datetime.fromtimestamp(record.unix_time, UTC)
    line: dict[str, object] = {
        "time": came.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "id": record.request_id,
        "method": record.method,
        "route": record.path[:200] if record.route == UNKNOWN_ROUTE else record.route,
        "status": record.status,
        "client_left": record.client_left,
        "error": record.error,
        "key": record.key_name,
        "total_ms": _ms(record.ended_at - record.received_at),
    }
    if record.model is None:
        return line
    outputs = record.sorted_outputs
    phases = [record.phases(output.metrics) for output in outputs]
    queue, prefill, decode = (_of(phases, name) for name in ("queue", "prefill", "decode"))
    line |= {
        "model": record.model,
        "answer_id": record.answer_id,
        "stream": record.is_streamed,
        "n": record.num_samples or None,
        "max_tokens": record.max_tokens,
        "prompt_tokens": sum(record.prompt_lengths),
        "cached_tokens": record.num_cached_tokens,
        "completion_tokens": record.num_output_tokens,
        "finish_reasons": record.finish_reasons,
        "preemptions": sum(output.metrics.num_preemptions for output in outputs),
        "prepare_ms": _slowest([(record.received_at, start) for start, _ in queue]),
        "queue_ms": _slowest(queue),
        "prefill_ms": _slowest(prefill),
        "decode_ms": _slowest(decode),
    }
    if record.prompts is not None:
        line["prompts"] = record.prompts
    return line


def _of(phases: list[dict[str, tuple[float, float]]], name: str) -> list[tuple[float, float]]:
    return [known[name] for known in phases if name in known]


def _slowest(times: list[tuple[float, float]]) -> float | None:
    return _ms(max(end - start for start, end in times)) if times else None


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
