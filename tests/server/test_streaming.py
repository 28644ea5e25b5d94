"""Streams: their chunks, and what happens when one fails midway."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from .fakes import ANSWER, MODEL, RunningServer
from .test_chat import MESSAGES


def stream(server: RunningServer, path: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """The events of a stream, and whether ``[DONE]`` came last."""
    response = server.http.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"  # nginx passes each event on at once
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks]
    is_done = data[-1] == "[DONE]"
    return [json.loads(text) for text in (data[:-1] if is_done else data)], is_done


def test_chat_chunks(server: RunningServer) -> None:
    chunks, is_done = stream(server, "/v1/chat/completions", {"messages": MESSAGES})
    assert is_done
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["id"].startswith("chatcmpl-")
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"].keys() for choice in choices[1:-1]] == [{"content"}] * len(ANSWER)
    assert "".join(choice["delta"]["content"] for choice in choices[:-1]) == ANSWER
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_completion_chunks(server: RunningServer) -> None:
    chunks, is_done = stream(server, "/v1/completions", {"prompt": "x", "max_tokens": 2})
    assert is_done
    assert chunks[0]["object"] == "text_completion"
    assert chunks[0]["id"].startswith("cmpl-")
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": "E", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "i", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}],
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": ["ab", "c"]}), ("/v1/chat/completions", {"messages": MESSAGES})],
)
def test_usage_and_n(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    body = {**body, "n": 2, "seed": 5, "max_tokens": 20}
    whole = server.http.post(path, json=body).json()
    chunks, is_done = stream(server, path, {**body, "stream_options": {"include_usage": True}})
    assert is_done
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    texts = [""] * len(whole["choices"])
    finished = []
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        assert choice["index"] not in finished
        texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        if choice["finish_reason"]:
            finished.append(choice["index"])
    assert texts == [c["text"] if "text" in c else c["message"]["content"] for c in whole["choices"]]
    assert sorted(finished) == list(range(len(texts)))


def test_chunks_carry_their_logprobs(server: RunningServer) -> None:
    body = {"prompt": "x", "logprobs": 1, "max_tokens": 100}
    whole = server.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    chunks, _ = stream(server, "/v1/completions", body)
    parts = [logprobs for chunk in chunks if (logprobs := chunk["choices"][0]["logprobs"])]
    assert len(parts) == len(whole["tokens"])  # tokens that complete no character included
    for key, values in whole.items():
        assert [value for part in parts for value in part[key]] == values

    chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}
    whole = server.http.post("/v1/chat/completions", json=chat).json()["choices"][0]["logprobs"]
    chunks, _ = stream(server, "/v1/chat/completions", chat)
    parts = [logprobs for chunk in chunks if (logprobs := chunk["choices"][0]["logprobs"])]
    assert [entry for part in parts for entry in part["content"]] == whole["content"]


def test_stop_string_is_never_shown(server: RunningServer) -> None:
    chunks, is_done = stream(server, "/v1/completions", {"prompt": "x", "stop": ["Tag"], "max_tokens": 100})
    assert is_done
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Ein schöner "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    server.engine.closed.get(timeout=5)


def test_openai_package_streams(server: RunningServer) -> None:
    text = ""
    for chunk in server.openai.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == ANSWER
    with server.openai.completions.create(model=MODEL, prompt="x", stream=True, max_tokens=3) as events:
        assert "".join(event.choices[0].text for event in events) == "Ein"


@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        ("[fail]", "request_failed", "the step raised"),
        ("[die]", "engine_dead", "ended with code -9"),
        ("[late]", "deadline_exceeded", "wasn't finished in time"),
        ("[stop]", "request_failed", "before it was finished"),
        ("[crash]", None, "internal error"),
    ],
)
def test_error_midway(server: RunningServer, prompt: str, code: str | None, message: str) -> None:
    chunks, is_done = stream(server, "/v1/completions", {"prompt": prompt})
    assert not is_done
    assert chunks[0]["choices"][0]["text"] == "E"
    assert chunks[-1].keys() == {"error"}
    assert chunks[-1]["error"]["code"] == code
    assert message in chunks[-1]["error"]["message"]
    with pytest.raises(openai.APIError, match=message):
        list(server.openai.completions.create(model=MODEL, prompt=prompt, stream=True))


def test_nothing_streams_unless_all_prompts_are_good(server: RunningServer) -> None:
    response = server.http.post("/v1/completions", json={"prompt": ["good", "x" * 1000], "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert not server.engine.requests


def test_an_event_is_one_line_to_any_client(server: RunningServer) -> None:
    """Python's ``splitlines``, and so httpx's ``iter_lines``, takes more for a line's end than SSE does."""
    text = "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"
    body = {"prompt": text, "echo": True, "stream": True, "max_tokens": 1}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == text + "E"
