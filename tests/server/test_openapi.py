"""``/openapi.json`` against what the routes do: requests that schemathesis makes up from it, and by mistake.

No answer may be a 5xx, take forever, or have a status, a content type or a shape that isn't in it.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode

from minivllm.config import ServerConfig
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.server.responses import ChatChunk, Completion

from .fakes import MODEL, FakeEngine, make_tokenizer


def make_app() -> FastAPI:
    tokenizer = make_tokenizer()
    return create_app(FakeEngine(tokenizer), tokenizer, ServerConfig(), MODEL, ServerState())


SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", make_app())
SCHEMA.config.max_stream_events = 10_000  # all of them
OPERATIONS = {result.ok().label: result.ok() for result in SCHEMA.get_all_operations()}
ROUTES_WITH_BODY = [label for label, operation in OPERATIONS.items() if operation.body]
CONFORMANCE = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "allow_header_conformance",
        "unsupported_method",
        "negative_data_rejection",
    ]
)
EXAMPLES = settings(max_examples=60, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@SCHEMA.parametrize()
@settings(EXAMPLES, phases=[Phase.explicit, Phase.generate])
def test_every_operation(case: schemathesis.Case) -> None:
    """Requests with every combination of right and wrong parts."""
    case.call_and_validate(checks=CONFORMANCE, timeout=30)


@pytest.mark.parametrize("label", ROUTES_WITH_BODY)
def test_accepted_requests(label: str) -> None:
    """Few fields at a time, and the model that there is: most such requests are served."""
    operation = OPERATIONS[label]
    required = {"prompt", "messages", "tokens"}
    statuses: Counter[int] = Counter()

    @EXAMPLES
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE), data=st.data())
    def check(case: schemathesis.Case, data: st.DataObject) -> None:
        optional = sorted(case.body.keys() - required - {"model"})
        kept = data.draw(st.sets(st.sampled_from(optional), max_size=2)) if optional else set()
        # Null counts as not given, and may be the value of any field, also of one that there isn't.
        needed = {name for name in required & case.body.keys() if case.body[name] is not None}
        body = {name: value for name, value in case.body.items() if name in needed | kept}
        # What the document can't say: token ids end somewhere, nothing may be empty, prompt and messages
        # exclude each other, the template has no tools.
        if "tokens" in body:
            body["tokens"] = [int(token) % 256 for token in body["tokens"]]
        if "prompt" in body and not isinstance(body["prompt"], str):
            body["prompt"] = ["a", "b"]
        if "prompt" in body:
            body["prompt"] = body["prompt"] or "x"
        for message in body.get("messages") or ():
            message["content"] = message.get("content") or "x"
            message["role"] = "user" if message["role"] == "tool" else message["role"]
        if label == "POST /tokenize":
            body.pop("prompt" if body.get("messages") else "messages", None)
            body = body or {"prompt": "x"}
        case.body = body
        response = case.call(timeout=30)
        case.validate_response(response, checks=CONFORMANCE)
        statuses[response.status_code] += 1

    check()
    assert statuses.total() >= 50, statuses
    assert statuses[200] >= 10, statuses


@pytest.mark.parametrize(
    ("label", "prompt", "chunk"),
    [
        ("POST /v1/completions", {"prompt": ["ab", "c"]}, TypeAdapter(Completion)),
        (
            "POST /v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hi"}]},
            TypeAdapter(ChatChunk),
        ),
    ],
)
def test_streams(label: str, prompt: dict[str, Any], chunk: TypeAdapter[Any]) -> None:
    """A stream's content type is in the document, and each of its events has the shape that is told of it."""
    operation = OPERATIONS[label]
    is_chat = "chat" in label
    num_streams = 0

    @EXAMPLES
    @given(
        fields=st.fixed_dictionaries(
            {},
            optional={
                "n": st.integers(1, 3),
                "max_tokens": st.integers(1, 30),
                "stop": st.sampled_from(["n", ["sch", "🦙"]]),
                "logprobs": st.booleans() if is_chat else st.integers(0, 3),
                "stream_options": st.fixed_dictionaries(
                    {"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
                ),
                **({} if is_chat else {"echo": st.booleans()}),
            },
        )
    )
    def check(fields: dict[str, Any]) -> None:
        nonlocal num_streams
        case = operation.Case(body={**prompt, **fields, "stream": True}, media_type="application/json")
        response = case.call(timeout=30)
        assert response.status_code == 200, response.text
        case.validate_response(response, checks=CONFORMANCE)
        assert response.headers["content-type"] == ["text/event-stream; charset=utf-8"]
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        for event in events:
            chunk.validate_python(json.loads(event.removeprefix("data: ")), strict=True, extra="forbid")
        num_streams += 1

    check()
    assert num_streams >= 50


def test_every_error_in_the_document_is_an_envelope() -> None:
    document = make_app().openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                if status != "200":
                    (content,) = answer["content"].values()
                    assert content["schema"] == {"$ref": "#/components/schemas/ErrorEnvelope"}, (path, method)
