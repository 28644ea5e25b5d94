"""What can be wrong with a request, and what the answer says about it."""

from __future__ import annotations

import gzip
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from minivllm.server.message_protocol import ChatMessage
from minivllm.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest

from .fakes import MAX_MODEL_LEN, MODEL, RunningServer, make_tokenizer
from .test_routes import ask

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VOCAB_SIZE = make_tokenizer().vocab_size
TOO_LONG = "x" * (MAX_MODEL_LEN * make_tokenizer().longest_token + 1)
"""For any tokens that the context holds."""


def says(response: Any, status: int, param: str | None, words: str) -> None:
    """Check an error's status and all of its envelope."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert len(response.content) < 2000


BAD_COMPLETION_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    # the prompt
    ({"prompt": None}, "prompt", "prompt is required"),
    ({"prompt": ""}, "prompt", "at least 1 token, got 0"),
    ({"prompt": []}, "prompt", "and not empty, got []"),
    ({"prompt": [[]]}, "prompt", "at least 1 token, got 0"),
    ({"prompt": 5}, "prompt", "a list of token ids or a list of such lists, and not empty, got 5"),
    ({"prompt": {"text": "x"}}, "prompt", "must be a string, a list of strings"),
    ({"prompt": [True]}, "prompt[0]", "must be an integer, got True"),
    ({"prompt": [1.5]}, "prompt[0]", "must be an integer, got 1.5"),
    ({"prompt": ["a", 1]}, "prompt[1]", "must be a string, got 1"),
    ({"prompt": [1, "a"]}, "prompt[1]", "must be an integer, got 'a'"),
    ({"prompt": [[1], 2]}, "prompt[1]", "must be a list, got 2"),
    ({"prompt": [[1], ["a"]]}, "prompt[1][0]", "must be an integer, got 'a'"),
    ({"prompt": [-1]}, "prompt", f"token ids must be from 0 to {VOCAB_SIZE - 1}, got -1"),
    ({"prompt": [1, VOCAB_SIZE]}, "prompt", f"got {VOCAB_SIZE}"),
    ({"prompt": [10**30]}, "prompt", "token ids must be from 0"),
    ({"prompt": "x" * 300}, "prompt", "the prompt alone has 300"),
    ({"prompt": TOO_LONG}, "prompt", f"but the prompt has {len(TOO_LONG)} bytes"),
    ({"prompt": TOO_LONG, "truncate_prompt_tokens": 4}, "prompt", f"{MAX_MODEL_LEN} tokens of at most"),
    ({"prompt": ["x"] * 1025}, "prompt", "a list of at most 1024, got one of 1025"),
    ({"prompt": [[]] * 1025}, "prompt", "a list of at most 1024, got one of 1025"),
    ({"prompt": ["x"] * 9, "n": 128}, "prompt", "at most 1024, got 9 times 128"),
    # sampling
    ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
    ({"max_tokens": -3}, "max_tokens", "at least 1, got -3"),
    ({"max_tokens": "5"}, "max_tokens", "must be an integer, got '5'"),
    ({"max_tokens": 5.0}, "max_tokens", "must be an integer, got 5.0"),
    ({"max_tokens": True}, "max_tokens", "must be an integer, got True"),
    ({"max_tokens": 256}, "max_tokens", f"maximum context length is {MAX_MODEL_LEN} tokens"),
    ({"max_tokens": 10**400}, "max_tokens", "at most 9223372036854775807"),
    ({"min_tokens": -1}, "min_tokens", "at least 0, got -1"),
    ({"min_tokens": 17}, "min_tokens", "at most 16 (max_tokens), got 17"),
    ({"min_tokens": 4, "max_tokens": 3}, "min_tokens", "at most 3 (max_tokens), got 4"),
    ({"n": 0}, "n", "at least 1, got 0"),
    ({"n": 129}, "n", "at most 128, got 129"),
    ({"n": 5000}, "n", "at most 128, got 5000"),
    ({"n": [1]}, "n", "must be an integer, got [1]"),
    ({"temperature": -0.1}, "temperature", "at least 0.0, got -0.1"),
    ({"temperature": 101}, "temperature", "at most 100.0, got 101.0"),
    ({"temperature": "hot"}, "temperature", "must be a number, got 'hot'"),
    ({"temperature": False}, "temperature", "must be a number, got False"),
    ({"temperature": 10**400}, "temperature", "must be a number"),
    ({"top_p": 0}, "top_p", "greater than 0, got 0"),
    ({"top_p": 1.01}, "top_p", "at most 1.0, got 1.01"),
    ({"top_k": -2}, "top_k", "at least -1, got -2"),
    ({"top_k": 0.5}, "top_k", "must be an integer, got 0.5"),
    ({"min_p": 1.5}, "min_p", "at most 1.0, got 1.5"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"presence_penalty": 2.1}, "presence_penalty", "at most 2.0, got 2.1"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "at least -2.0, got -2.1"),
    ({"seed": 2**63}, "seed", "at most 9223372036854775807"),
    ({"seed": "7"}, "seed", "must be an integer, got '7'"),
    ({"stop": 5}, "stop", "must be a string or a list of strings, got 5"),
    ({"stop": ["a", 5]}, "stop[1]", "must be a string, got 5"),
    ({"stop": ""}, "stop", "non-empty strings"),
    ({"stop": ["x"] * 17}, "stop", "at most 16 stop strings, got 17"),
    ({"stop_token_ids": 5}, "stop_token_ids", "must be a list, got 5"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "at least 0, got -1"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", f"below {VOCAB_SIZE}, got {VOCAB_SIZE}"),
    ({"ignore_eos": 1}, "ignore_eos", "must be true or false, got 1"),
    ({"logprobs": 21}, "logprobs", "at most 20, got 21"),
    ({"logprobs": True}, "logprobs", "must be an integer, got True"),
    # streaming
    ({"stream": "yes"}, "stream", "must be true or false, got 'yes'"),
    ({"stream_options": {}}, "stream_options", "only allowed with stream: true"),
    ({"stream": True, "stream_options": []}, "stream_options", "must be an object, got []"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "must be true or false, got 1",
    ),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "must be one of False, got True",
    ),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "only allowed with stream: false"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20, got 21"),
    # fields that are not there
    ({"temprature": 1}, "temprature", "unknown field 'temprature'; did you mean 'temperature'?"),
    ({"xyz": 1}, "xyz", "unknown field 'xyz'"),
    ({"<xyz>": 1}, "<xyz>", "unknown field '<xyz>'"),
    ({"x" * 50_000: 1}, "x" * 80, "unknown field"),
    ({"suffix": "the end"}, "suffix", "'suffix' is not supported"),
    ({"echo": "yes"}, "echo", "must be true or false, got 'yes'"),
    ({"best_of": 2, "n": 3}, "best_of", "at least n, which is 3, got 2"),
    ({"best_of": 0}, "best_of", "at least n, which is 1, got 0"),
    ({"best_of": 200}, "best_of", "at most 128, got 200"),
    ({"best_of": 2, "stream": True}, "best_of", "with stream: true, got 2 and n 1"),
    ({"store": True}, "store", "must be one of False, got True"),
    ({"user": 5}, "user", "must be a string, got 5"),
    ({"priority": 1.5}, "priority", "must be an integer, got 1.5"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "got the key 'a'"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "got the key '-1'"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "at most 100.0, got 101.0"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5", "must be a number, got 'x'"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", f"below {VOCAB_SIZE}, got {VOCAB_SIZE}"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024 tokens, got 1025"),
    ({"logit_bias": [5]}, "logit_bias", "must be an object, got [5]"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, got 0"),
    ({"skip_special_tokens": 1}, "skip_special_tokens", "must be true or false, got 1"),
    ({"include_stop_str_in_output": "x"}, "include_stop_str_in_output", "must be true or false"),
    ({"echo": True, "max_tokens": -1}, "max_tokens", "at least 1, got -1"),
    ({"model": 5}, "model", "must be a string, got 5"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_COMPLETION_FIELDS)
def test_completions(server: RunningServer, fields: dict[str, Any], param: str, words: str) -> None:
    response = server.http.post(COMPLETIONS, json={"prompt": "x", **fields})
    says(response, 400, param, words)
    assert not server.engine.requests


IMAGE = {"type": "image_url", "image_url": {"url": "http://example.com/cat.png"}}
USER = {"role": "user", "content": "Hi"}

BAD_CHAT_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "messages is required"),
    ({"messages": []}, "messages", "a list of at least 1, got []"),
    ({"messages": [{}] * 16_385}, "messages", "must be at most 16384, got 16385"),
    ({"messages": [{"content": [0] * 8192}] * 2}, "messages", "tool calls, must be at most 16384, got 16386"),
    ({"messages": [{"tool_calls": [0] * 8192}] * 2}, "messages", "must be at most 16384, got 16386"),
    ({"messages": "Hi"}, "messages", "must be a list, got 'Hi'"),
    ({"messages": ["Hi"]}, "messages[0]", "must be an object, got 'Hi'"),
    ({"messages": [{}]}, "messages[0].role", "messages[0].role is required"),
    ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1].role", "'tool', got 'robot'"),
    (
        {"messages": [{"role": "user"}]},
        "messages[0].content",
        "content is required in a message of role user",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "content is required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a list of text parts, got 5"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "must be an object"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "only text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "is required",
    ),
    (
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
        "messages[0].content[0].type",
        "is required",
    ),
    (
        {"messages": [{"role": "assistant", "refusal": "no"}]},
        "messages[0].refusal",
        "'refusal' is not supported",
    ),
    ({"messages": [{**USER, "colour": "red"}]}, "messages[0].colour", "unknown field 'colour'"),
    (
        {"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]},
        "messages",
        "this model has no tools",
    ),
    ({"messages": [{**USER, "content": "x" * 300}]}, "messages", "the prompt alone has 318"),
    ({"max_tokens": 250}, "max_tokens", "max_tokens is 250"),
    ({"max_completion_tokens": 250}, "max_completion_tokens", "max_tokens is 250"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1, got 0"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "3 and 4 were given"),
    ({"min_tokens": 300}, "min_tokens", "got 300"),
    ({"logprobs": 1}, "logprobs", "must be true or false, got 1"),
    ({"top_logprobs": 2}, "top_logprobs", "only allowed with logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20, got 21"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "at least 0, got -1"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "'chat_template' is not supported"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "reads no 'x'; it reads: none"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs", "reads no 'messages'"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs.x", "got [1]"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "exclude each other",
    ),
    ({"echo": True}, "echo", "'echo' is not supported"),
    ({"best_of": 2}, "best_of", "unknown field 'best_of'"),
    ({"verbosity": "low"}, "verbosity", "'verbosity' is not supported"),
    ({"prompt": "x"}, "prompt", "unknown field 'prompt'"),
    ({"n": 0}, "n", "at least 1, got 0"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_CHAT_FIELDS)
def test_chat(server: RunningServer, fields: dict[str, Any], param: str, words: str) -> None:
    response = server.http.post(CHAT, json={"messages": [USER], **fields})
    says(response, 400, param, words)
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": [USER]}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": ["x"]}, "prompt", "must be a string, got ['x']"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens", "true or false"),
        ("/tokenize", {"messages": []}, "messages", "at least 1"),
        ("/tokenize", {"messages": [{}] * 16_385}, "messages", "must be at most 16384, got 16385"),
        ("/tokenize", {"prompt": TOO_LONG}, "prompt", f"but the prompt has {len(TOO_LONG)} bytes"),
        ("/tokenize", {"messages": [{**USER, "content": TOO_LONG}]}, "messages", "shorten it"),
        ("/detokenize", {}, "tokens", "tokens is required"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]", "must be an integer, got '1'"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens", f"from 0 to {VOCAB_SIZE - 1}, got {VOCAB_SIZE}"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "got -1"),
        ("/detokenize", {"tokens": [2**70]}, "tokens", "got 1180591620717411303424"),
    ],
)
def test_tokenize(server: RunningServer, path: str, body: Any, param: str, words: str) -> None:
    says(server.http.post(path, json=body), 400, param, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must be a JSON object, got nothing"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "x"', "not valid JSON"),
        (b'{"prompt": "x",}', "trailing comma at line 1 column 16"),
        (b"{'prompt': 'x'}", "not valid JSON"),
        (b'{"prompt": "\xff"}', "invalid unicode code point"),
        (rb'{"prompt": "\ud800"}', "not valid JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "x", "temperature": Infinity}', "not valid JSON"),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "recursion limit exceeded"),
        (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'[{"prompt": "x"}]', "the body must be an object, got [{"),
        (b'"prompt"', "the body must be an object, got 'prompt'"),
        (b"null", "must be an object, got None"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
def test_body_that_is_no_json_object(server: RunningServer, path: str, content: bytes, words: str) -> None:
    response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    says(response, 400, None, words)


def test_infinity_in_disguise(server: RunningServer) -> None:
    content = b'{"prompt": "x", "temperature": 1e999}'
    response = server.http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    says(response, 400, "temperature", "must be a finite number")


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "a/b/c; ="]
)
def test_body_that_does_not_say_it_is_json(server: RunningServer, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = server.http.post(COMPLETIONS, content=b'{"prompt": "x"}', headers=headers)
    says(response, 400, None, "Content-Type: application/json")


def test_a_compressed_body(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = server.http.post(COMPLETIONS, content=gzip.compress(b'{"prompt": "x"}'), headers=headers)
    says(response, 415, None, "must not be compressed, got Content-Encoding: gzip")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_unknown_model(server: RunningServer, path: str) -> None:
    body = {
        COMPLETIONS: {"prompt": "x"},
        CHAT: {"messages": [USER]},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
    }[path]
    response = server.http.post(path, json={**body, "model": "gpt-5"})
    says(response, 404, "model", f"the model 'gpt-5' does not exist here; this server serves '{MODEL}'")
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/", 404, "unknown route GET /"),
        ("GET", "/docs", 404, "unknown route GET /docs"),
        ("POST", "/v1/chat", 404, "unknown route POST /v1/chat"),
        ("POST", "/v1/completions/", 404, "unknown route"),
        ("GET", "/v1/%ff%00", 404, "unknown route"),
        ("GET", "/" + "x" * 5000, 404, "unknown route"),
        ("POST", COMPLETIONS + "%0a", 404, "unknown route POST /v1/completions\n"),
        ("GET", "/health%0A", 404, "unknown route GET /health\n"),
        ("GET", "/v1/models/x%0a", 404, "unknown route"),
        ("GET", "/version%00", 404, "unknown route"),
        ("GET", COMPLETIONS, 405, "/v1/completions does not take GET"),
        ("DELETE", "/v1/models", 405, "/v1/models does not take DELETE"),
        ("POST", "/health", 405, "/health does not take POST"),
    ],
)
def test_unknown_routes(server: RunningServer, method: str, path: str, status: int, words: str) -> None:
    response = server.http.request(method, path)
    says(response, status, None, words)
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [0, "x", "x"]}),
        (CompletionRequest, {"prompt": ["x", 0, 0]}),
        (CompletionRequest, {"prompt": [[0, "x", "x"], [0, "x", "x"]]}),
        (CompletionRequest, {"prompt": "x", "stop": [0, 0]}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": ["x", "x"]}),
        (CompletionRequest, {"prompt": "x", "a": 0, "b": 0}),
        (ChatRequest, {"messages": [0, 0]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [0, 0]}]}),
        (DetokenizeRequest, {"tokens": ["x", "x"]}),
    ],
)
def test_long_lists_are_refused_at_the_first_wrong_item(model: type[BaseModel], body: Any) -> None:
    """Collecting them all would turn a few megabytes of wrong items into gigabytes of errors."""
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    assert error.value.error_count() == 1


LONG = "x" * 20_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "x", "temperature": LONG}, "temperature"),
        (COMPLETIONS, {"prompt": "x", "model": LONG}, "model"),
        (COMPLETIONS, {"prompt": {LONG: LONG}}, "prompt"),
        (COMPLETIONS, {"prompt": "x", LONG: 1}, LONG[:80]),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [10**4000]}, "stop_token_ids"),
        (CHAT, {"messages": [{"role": LONG, "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": LONG}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "user", "content": "x", LONG: 1}]}, f"messages[0].{LONG[:80]}"),
    ],
)
def test_long_values_are_not_sent_back(server: RunningServer, path: str, body: Any, param: str) -> None:
    says(server.http.post(path, json=body), 404 if param == "model" else 400, param, "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=3,
)
MESSAGE = st.dictionaries(st.sampled_from([*ChatMessage.model_fields, "x"]), JSON)
FIELDS = sorted(CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys())


@settings(
    max_examples=80,
    # One server for all examples is meant.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    path=st.sampled_from([COMPLETIONS, CHAT]),
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(MESSAGE, max_size=2), max_size=3),
)
def test_whatever_is_sent(server: RunningServer, path: str, fields: dict[str, Any]) -> None:
    """Every JSON object gets an answer, or an error that says what is wrong with it."""
    body: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": [USER]}
    response = server.http.post(path, json=body | fields)
    if response.status_code != 200:
        is_other_model = response.json()["error"]["code"] == "model_not_found"
        says(response, 404 if is_other_model else 400, ANY, "")


def test_chat_without_a_template() -> None:
    response = ask("POST", CHAT, json={"messages": [USER]}, tokenizer=make_tokenizer(chat_template=None))
    says(response, 400, "messages", "has no chat template")
