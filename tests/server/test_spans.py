"""``--otlp-endpoint``: a request's spans, with the engine's own times."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from minivllm.config import ServerConfig
from minivllm.errors import ConfigError
from minivllm.request import CompletionOutput, FinishReason, RequestMetrics
from minivllm.server.record import RequestRecord
from minivllm.server.spans import Spans

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def finished_record() -> RequestRecord:
    """Two samples: one that ended by itself, and one that was never begun."""
    record = RequestRecord(
        "mine", "POST", "/v1/completions", f"00-{TRACE}-{PARENT}-01", received_at=50.0, unix_time=1_000_000.0
    )
    record.route, record.model, record.num_samples, record.prompt_lengths = "/v1/completions", "m", 2, [40]
    record.answer_id, record.max_tokens, record.status, record.is_complete = "cmpl-1", 3, 200, True
    record.ended_at = 54.0
    times = RequestMetrics(50.5, 51.0, 52.0, 53.5, num_cached_tokens=32, num_preemptions=1)
    record.outputs = {
        0: CompletionOutput(0, "", [1, 2, 3], FinishReason.LENGTH, None, times),
        1: CompletionOutput(1, "", [], None, None, RequestMetrics()),
    }
    return record


def test_a_request_s_spans() -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    spans = Spans("http://unused", exporter)
    spans(finished_record())
    spans(RequestRecord("other", "GET", "/version"))  # asks for no tokens
    spans.close()
    found = exporter.get_finished_spans()
    assert {span.context.trace_id for span in found} == {int(TRACE, 16)}
    assert all(span.resource.attributes["service.name"] == "minivllm" for span in found)

    (root,) = (span for span in found if span.name == "text_completion m")
    assert root.parent.span_id == int(PARENT, 16)
    assert (root.start_time, root.end_time) == (1_000_000 * 10**9, 1_000_004 * 10**9)
    assert root.attributes["gen_ai.usage.input_tokens"] == 40
    assert root.attributes["gen_ai.usage.cache_read.input_tokens"] == 32
    assert root.attributes["gen_ai.usage.output_tokens"] == 3
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length", "error")
    assert root.attributes["minivllm.request_id"] == "mine"

    children = [span for span in found if span is not root]
    assert all(span.parent.span_id == root.context.span_id for span in children)
    assert [
        (span.name, span.start_time / 1e9 - 1_000_000, span.end_time / 1e9 - 1_000_000) for span in children
    ] == [("queue", 0.5, 1.0), ("prefill", 1.0, 2.0), ("decode", 2.0, 3.5)]


def test_errors_are_marked() -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    spans = Spans("http://unused", exporter)
    record = finished_record()
    record.status, record.error, record.traceparent = 500, "engine_dead", "not a traceparent"
    spans(record)
    spans.close()
    root = exporter.get_finished_spans()[-1]
    assert root.parent is None
    assert not root.status.is_ok
    assert root.attributes["error.type"] == "engine_dead"


def test_they_are_posted_to_the_endpoint() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    posted: list[tuple[str, str | None, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.path, self.headers["Content-Type"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        spans = Spans(f"http://127.0.0.1:{collector.server_port}/")
        spans(finished_record())
        spans.close()
        collector.shutdown()
        thread.join()
    ((path, kind, body),) = posted
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    assert b"prefill" in body
    assert bytes.fromhex(TRACE) in body


def test_without_the_package_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from minivllm.errors import ConfigError\n"
        "from minivllm.server.spans import Spans\n"
        "try:\n    Spans('http://localhost:4318')\n"
        "except ConfigError as error: print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--otlp-endpoint needs the package opentelemetry" in answer
    assert "pip install 'minivllm[otel]'" in answer


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "grpc://localhost:4317", "http://"])
def test_endpoints_are_urls(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint must be a URL"):
        ServerConfig(otlp_endpoint=endpoint)
