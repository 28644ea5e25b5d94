"""Bodies as bytes: what a JSON library wouldn't write, values at the edges of their types, wrong nesting.

``test_bad_requests.py`` has the table of each field's wrong values.
"""

from __future__ import annotations

import asyncio
import gc

import pytest
from starlette.types import Message

from minivllm.server.body import JsonRequest

from .fakes import ANSWER, MODEL, RunningServer
from .test_bad_requests import CHAT, COMPLETIONS, VOCAB_SIZE, says

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
HI = b'"messages": [{"role": "user", "content": "Hi"}]'
ROLES = "one of 'system', 'developer', 'user', 'assistant' or 'tool'"


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def completion(field: bytes) -> bytes:
    return b'{"prompt": "x", ' + field + b"}"


def message(content: bytes) -> bytes:
    return b'{"messages": [{"role": "user", "content": ' + content + b"}]}"


NOT_JSON: list[tuple[str, bytes, str]] = [
    # numbers that JSON doesn't have
    (COMPLETIONS, completion(b'"temperature": -Infinity'), "invalid number"),
    (COMPLETIONS, completion(b'"logit_bias": {"5": NaN}'), "expected value"),
    (COMPLETIONS, completion(b'"n": 0x1'), "expected `,` or `}`"),
    (COMPLETIONS, completion(b'"n": 01'), "invalid number"),
    (COMPLETIONS, completion(b'"n": +1'), "expected value"),
    (COMPLETIONS, completion(b'"temperature": .5'), "expected value"),
    (COMPLETIONS, completion(b'"temperature": 1.'), "invalid number"),
    (COMPLETIONS, completion(b'"stream": True'), "expected value"),
    (DETOKENIZE, b'{"tokens": [NaN]}', "expected value"),
    (DETOKENIZE, b'{"tokens": [' + b"9" * 4301 + b"]}", "number out of range"),
    # text that isn't
    (COMPLETIONS, b'{"prompt": "a\x00b"}', "control character"),
    (COMPLETIONS, b'{"prompt": "a\tb"}', "control character"),
    (COMPLETIONS, b'{"prompt": "\\x41"}', "invalid escape"),
    (COMPLETIONS, b'{"prompt": "\\ud83d x"}', "unexpected end of hex escape"),
    (COMPLETIONS, b'{"\\ud800": 1}', "unexpected end of hex escape"),
    (CHAT, message(b'"\\udc00"'), "lone leading surrogate"),
    (CHAT, message(b'"\xed\xa0\x80"'), "invalid unicode code point"),
    (CHAT, message(b'"\xc0\x80"'), "invalid unicode code point"),
    (TOKENIZE, b'{"prompt": "\xf0\x9f\xa6"}', "invalid unicode code point"),
    (COMPLETIONS, b'\xef\xbb\xbf{"prompt": "x"}', "expected value at line 1 column 1"),
    (COMPLETIONS, '{"prompt": "x"}'.encode("utf-16"), "expected value at line 1 column 1"),
    (COMPLETIONS, b"\x00", "expected value at line 1 column 1"),
    # structure
    (COMPLETIONS, b'{"prompt": "x"}{"prompt": "y"}', "trailing characters"),
    (COMPLETIONS, completion(b"1: 2"), "key must be a string"),
    (COMPLETIONS, completion(b'/* a comment */ "n": 1'), "key must be a string"),
    (COMPLETIONS, b"prompt=x&n=1", "expected value"),
    (CHAT, b'{"messages": ' + nested(1000) + b"}", "recursion limit exceeded"),
    (DETOKENIZE, b'{"tokens": ' + b'{"a":' * 5000 + b"}" * 5000 + b"}", "recursion limit exceeded"),
]


@pytest.mark.parametrize(("path", "content", "words"), NOT_JSON)
def test_not_json(server: RunningServer, path: str, content: bytes, words: str) -> None:
    response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    says(response, 400, None, "the body is not valid JSON")
    assert words in response.json()["error"]["message"]


REFUSED: list[tuple[str, bytes, str | None, str]] = [
    # no object
    (COMPLETIONS, b"5", None, "the body must be an object, got 5"),
    (CHAT, b"true", None, "the body must be an object, got True"),
    (TOKENIZE, b"[]", None, "the body must be an object, got []"),
    (DETOKENIZE, b'[["tokens", [1]]]', None, "the body must be an object, got [['tokens', [1]]]"),
    (CHAT, b"{}", "messages", "messages is required"),
    (COMPLETIONS, b"{}", "prompt", "prompt is required"),
    # numbers at the edges
    (COMPLETIONS, completion(b'"temperature": -1e999'), "temperature", "must be a finite number, got -inf"),
    (COMPLETIONS, completion(b'"logit_bias": {"5": 1e999}'), "logit_bias.5", "a finite number, got inf"),
    (COMPLETIONS, completion(b'"n": 1e2'), "n", "must be an integer, got 100.0"),
    (COMPLETIONS, completion(b'"n": -0'), "n", "at least 1, got 0"),
    (COMPLETIONS, completion(b'"n": 1' + b"0" * 4000), "n", "at most 9223372036854775807, got 1000"),
    (
        COMPLETIONS,
        completion(b'"seed": -9223372036854775809'),
        "seed",
        "at least -9223372036854775808, got -92",
    ),
    (
        COMPLETIONS,
        completion(b'"priority": 9223372036854775808'),
        "priority",
        "at most 9223372036854775807, got",
    ),
    (COMPLETIONS, completion(b'"top_k": 9223372036854775808'), "top_k", "got 9223372036854775808"),
    (COMPLETIONS, completion(b'"logprobs": -1'), "logprobs", "at least 0, got -1"),
    (COMPLETIONS, completion(b'"prompt_logprobs": -1'), "prompt_logprobs", "at least 0, got -1"),
    (COMPLETIONS, completion(b'"top_p": -1'), "top_p", "at least 0.0, got -1.0"),
    (COMPLETIONS, completion(b'"min_p": -0.1'), "min_p", "at least 0.0, got -0.1"),
    (COMPLETIONS, completion(b'"repetition_penalty": 11'), "repetition_penalty", "at most 10.0, got 11.0"),
    (COMPLETIONS, completion(b'"presence_penalty": -3'), "presence_penalty", "at least -2.0, got -3.0"),
    (COMPLETIONS, completion(b'"frequency_penalty": 3'), "frequency_penalty", "at most 2.0, got 3.0"),
    (
        COMPLETIONS,
        completion(b'"truncate_prompt_tokens": -1'),
        "truncate_prompt_tokens",
        "at least 1, got -1",
    ),
    (
        COMPLETIONS,
        completion(b'"stop_token_ids": [258]'),
        "stop_token_ids",
        f"below {VOCAB_SIZE}, got {VOCAB_SIZE}",
    ),
    (COMPLETIONS, completion(b'"stop_token_ids": [1.5]'), "stop_token_ids[0]", "an integer, got 1.5"),
    (CHAT, b"{" + HI + b', "top_logprobs": 1.0, "logprobs": true}', "top_logprobs", "an integer, got 1.0"),
    (DETOKENIZE, b'{"tokens": [1.0]}', "tokens[0]", "must be an integer, got 1.0"),
    (DETOKENIZE, b'{"tokens": [-9223372036854775809]}', "tokens", "got -9223372036854775809"),
    # nesting
    (COMPLETIONS, b'{"prompt": [[[1]]]}', "prompt[0][0]", "must be an integer, got [1]"),
    (COMPLETIONS, b'{"prompt": [["a"]]}', "prompt[0][0]", "must be an integer, got 'a'"),
    (COMPLETIONS, b'{"prompt": [{"a": 1}]}', "prompt[0]", "must be an integer, got {'a': 1}"),
    (COMPLETIONS, b'{"prompt": [null]}', "prompt[0]", "must be an integer, got None"),
    (COMPLETIONS, b'{"prompt": ["a", null]}', "prompt[1]", "must be a string, got None"),
    (COMPLETIONS, b'{"prompt": ' + nested(150) + b"}", "prompt[0][0]", "must be an integer, got [[["),
    (COMPLETIONS, completion(b'"stop": [["x"]]'), "stop[0]", "must be a string, got ['x']"),
    (COMPLETIONS, completion(b'"stop": {}'), "stop", "a string or a list of strings, got {}"),
    (COMPLETIONS, completion(b'"stop": [""]'), "stop", "non-empty strings, got ''"),
    (CHAT, b'{"messages": {"role": "user", "content": "x"}}', "messages", "must be a list, got {"),
    (CHAT, b'{"messages": [[{"role": "user"}]]}', "messages[0]", "must be an object, got [{"),
    (CHAT, b'{"messages": [null]}', "messages[0]", "must be an object, got None"),
    (CHAT, b'{"messages": ' + nested(100) + b"}", "messages[0]", "must be an object, got [[["),
    (CHAT, b'{"messages": [{"role": ["user"]}]}', "messages[0].role", f"{ROLES}, got ['user']"),
    (CHAT, b'{"messages": [{"role": "User"}]}', "messages[0].role", f"{ROLES}, got 'User'"),
    (CHAT, b'{"messages": [{"content": "x"}]}', "messages[0].role", "messages[0].role is required"),
    (
        CHAT,
        message(b'{"type": "text", "text": "x"}'),
        "messages[0].content",
        "a string or a list of text parts, got {",
    ),
    (
        CHAT,
        message(b'[{"type": "text", "text": 5}]'),
        "messages[0].content[0].text",
        "must be a string, got 5",
    ),
    (CHAT, message(b'[{"type": "input_audio"}]'), "messages[0].content[0].type", "got 'input_audio'"),
    (CHAT, message(b'"x", "name": 5'), "messages[0].name", "must be a string, got 5"),
    (CHAT, b"{" + HI + b', "metadata": []}', "metadata", "must be an object, got []"),
    (DETOKENIZE, b'{"tokens": [[1]]}', "tokens[0]", "must be an integer, got [1]"),
    (DETOKENIZE, b'{"tokens": "1 2"}', "tokens", "must be a list, got '1 2'"),
    (DETOKENIZE, b'{"tokens": null}', "tokens", "tokens is required"),
    (TOKENIZE, b'{"prompt": 5}', "prompt", "must be a string, got 5"),
    (
        TOKENIZE,
        b'{"messages": [{"role": "robot", "content": "x"}]}',
        "messages[0].role",
        f"{ROLES}, got 'robot'",
    ),
    # names
    (COMPLETIONS, completion(b'"a\\u0000": 1'), "a\x00", r"unknown field 'a\x00'"),
    (COMPLETIONS, completion(b'"": 1'), "", "unknown field ''"),
    (COMPLETIONS, completion(b'"max_token": 1'), "max_token", "did you mean 'max_tokens'?"),
    (CHAT, b"{" + HI + b', "Temperature": 5}', "Temperature", "did you mean 'temperature'?"),
    (CHAT, b'{"message": []}', "message", "did you mean 'messages'?"),
    (CHAT, message(b'"x", "nam": 5'), "messages[0].nam", "did you mean 'name'?"),
    (
        CHAT,
        b"{" + HI + b', "stream": true, "stream_options": {"include_usag": true}}',
        "stream_options.include_usag",
        "did you mean 'include_usage'?",
    ),
    (TOKENIZE, b'{"promt": "x"}', "promt", "did you mean 'prompt'?"),
    (TOKENIZE, b'{"prompt": "x", "return_token_strs": true}', "return_token_strs", "is not supported"),
    (DETOKENIZE, b'{"token": [1]}', "token", "did you mean 'tokens'?"),
    (CHAT, b"{" + HI + b', "logit_bias": {"1.5": 1}}', "logit_bias", "got the key '1.5'"),
    (CHAT, b"{" + HI + b', "logit_bias": {"": 1}}', "logit_bias", "got the key ''"),
    (CHAT, b"{" + HI + b', "logit_bias": {"5": null}}', "logit_bias.5", "must be a number, got None"),
    (CHAT, b"{" + HI + b', "logit_bias": {"99999999999999999999": 1}}', "logit_bias", "the key '99999"),
    # structured output
    (
        COMPLETIONS,
        completion(
            b'"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": true}}'
        ),
        "response_format.json_schema.name",
        "must be a string that matches ^[a-zA-Z0-9_-]{1,64}$, got 'a b'",
    ),
    (
        COMPLETIONS,
        completion(b'"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}'),
        "response_format.json_schema.schema",
        "must be a JSON schema: an object, true or false, got 5",
    ),
    (
        COMPLETIONS,
        completion(b'"structured_outputs": {"json": 5}'),
        "structured_outputs.json",
        "or its text, got 5",
    ),
    # a field given twice: the last one counts
    (COMPLETIONS, b'{"prompt": "x", "prompt": 5}', "prompt", "and not empty, got 5"),
    (COMPLETIONS, completion(b'"n": 1, "n": 0'), "n", "at least 1, got 0"),
]


@pytest.mark.parametrize(("path", "content", "param", "words"), REFUSED)
def test_refused(server: RunningServer, path: str, content: bytes, param: str | None, words: str) -> None:
    response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    says(response, 400, param, words)
    assert not server.engine.requests


def test_a_nul_is_a_character_like_others(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"prompt": "a\\u0000b", "stop": "\\u0000", "max_tokens": 3}'
    answer = server.http.post(COMPLETIONS, content=body, headers=headers).json()
    assert answer["choices"][0]["text"] == ANSWER[:3]
    ((prompt, _),) = server.engine.requests.values()
    assert prompt == [*b"a\0b"]
    response = server.http.post(COMPLETIONS, content=completion(b'"model": "\\u0000"'), headers=headers)
    says(response, 404, "model", rf"the model '\x00' does not exist here; this server serves '{MODEL}'")


def test_of_a_field_given_twice_the_last_counts(server: RunningServer) -> None:
    body = completion(b'"max_tokens": 0, "max_tokens": 2, "n": "x", "n": 1')
    response = server.http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert response.json()["choices"][0]["text"] == ANSWER[:2]


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=x", "text/json", "application/xml"])
@pytest.mark.parametrize(
    ("path", "content"),
    [(CHAT, b"{" + HI + b"}"), (TOKENIZE, b'{"prompt": "x"}'), (DETOKENIZE, b'{"tokens": []}')],
)
def test_other_content_types(server: RunningServer, path: str, content: bytes, content_type: str) -> None:
    response = server.http.post(path, content=content, headers={"Content-Type": content_type})
    says(response, 400, None, "Content-Type: application/json")


def test_no_garbage_is_looked_for_among_what_is_read() -> None:
    """Millions of lists in one body would each time be walked over, while nobody else is served."""
    content = b"[" + b"[]," * 20_000 + b"[]]"
    collections: list[str] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": content, "more_body": False}

    def note(phase: str, _: object) -> None:
        collections.append(phase)

    gc.callbacks.append(note)
    try:
        read = asyncio.run(JsonRequest({"type": "http", "headers": []}, receive).json())
    finally:
        gc.callbacks.remove(note)
    assert len(read) == 20_001
    assert len(collections) < 10
    assert gc.isenabled()
