"""``--otlp-endpoint``: OpenTelemetry spans of requests, made when a request is over, from its own times.

A span for each HTTP request that asked for tokens, in the trace that its ``traceparent`` header names, and in
it ``queue``, ``prefill`` and ``decode`` of each sample. Attributes follow OpenTelemetry's conventions for
generative AI. Nothing waits for the collector: a thread of the SDK's sends them, and drops what it can't.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import minivllm
from minivllm.errors import ConfigError
from minivllm.server.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

EXPORT_SECONDS = 5
"""Longest that one attempt to reach the collector may take; the last of them delays the server's end."""
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


class Spans:
    """Makes the spans and has them sent.

    The SDK's own environment variables hold: ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``,
    ``OTEL_TRACES_SAMPLER``, ``OTEL_EXPORTER_OTLP_HEADERS``.
    """

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        """``exporter``: instead of one that posts to ``endpoint``.

        Raises:
            ConfigError: OpenTelemetry isn't installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--otlp-endpoint needs the package {error.name}: pip install 'minivllm[otel]'"
            ) from None
        name = os.environ.get("OTEL_SERVICE_NAME", "minivllm")
        resource = Resource.create({"service.name": name, "service.version": minivllm.__version__})
        # Not the SDK's global provider: whatever else traces in this process keeps its own.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        url = f"{endpoint.rstrip('/')}/v1/traces"
        exporter = exporter or OTLPSpanExporter(endpoint=url, timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("minivllm", minivllm.__version__)

    def __call__(self, record: RequestRecord) -> None:
        """Make the spans of ``record``, if it is of a request for tokens."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if record.model is None:
            return

        def unix_ns(moment: float) -> int:
            return round((record.unix_time + moment - record.received_at) * 1e9)

        carrier = {} if record.traceparent is None else {"traceparent": record.traceparent}
        operation = OPERATIONS.get(record.route, "text_completion")
        span = self._tracer.start_span(
            f"{operation} {record.model}",
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            start_time=unix_ns(record.received_at),
            attributes={
                "http.request.method": record.method,
                "http.route": record.route,
                "http.response.status_code": record.status or 0,
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "minivllm",
                "gen_ai.request.model": record.model,
                "gen_ai.request.choice.count": record.num_samples,
                "gen_ai.request.max_tokens": record.max_tokens or 0,
                "gen_ai.response.id": record.answer_id or "",
                "gen_ai.response.finish_reasons": record.finish_reasons,
                "gen_ai.usage.input_tokens": sum(record.prompt_lengths),
                "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
                "gen_ai.usage.output_tokens": record.num_output_tokens,
                "minivllm.request_id": record.request_id,
            },
        )
        if record.error is not None:
            span.set_attribute("error.type", record.error)
        if (record.status or 0) >= 500:
            span.set_status(StatusCode.ERROR)
        within = set_span_in_context(span)
        for index, output in sorted(record.outputs.items()):
            for phase, (start, end) in record.phases(output.metrics).items():
                attributes = {"minivllm.sample": index}
                if phase == "decode":
                    attributes["gen_ai.usage.output_tokens"] = len(output.token_ids)
                    attributes["minivllm.preemptions"] = output.metrics.num_preemptions
                child = self._tracer.start_span(
                    phase, context=within, start_time=unix_ns(start), attributes=attributes
                )
                child.end(unix_ns(end))
        span.end(unix_ns(record.ended_at))

    def close(self) -> None:
        """Send what hasn't been sent."""
        self._provider.shutdown()
