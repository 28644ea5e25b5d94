"""A stream, put together, is the whole answer: text, log probabilities, finish reasons, usage.

With a seed, at temperature 1: quantised weights give the same bits whoever else is served.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import httpx
import pytest

from tests.serving.conftest import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAMPLED = {"temperature": 1, "seed": 11, "max_tokens": 16}
POEM = [{"role": "user", "content": "Write a line about the sea, and one about the moon 🌙."}]

REQUESTS = [
    (COMPLETIONS, {"prompt": "My favourite animal"}),
    (COMPLETIONS, {"prompt": "My favourite animal", "n": 3, "logprobs": 2}),
    (COMPLETIONS, {"prompt": ["My favourite", "Ein schöner Tag"], "n": 3, "logprobs": 0, "echo": True}),
    (COMPLETIONS, {"prompt": "Ein 🦙", "echo": True, "max_tokens": 0, "logprobs": 1}),
    (COMPLETIONS, {"prompt": "Once upon a time", "n": 3, "stop": ["e ", "a"], "logprobs": 1}),
    (
        COMPLETIONS,
        {"prompt": "Once upon a time", "stop": [" the"], "include_stop_str_in_output": True, "n": 3},
    ),
    (COMPLETIONS, {"prompt": "🌙🌙", "n": 3, "logprobs": 3, "temperature": 4}),
    (CHAT, {"messages": POEM}),
    (CHAT, {"messages": POEM, "n": 3, "logprobs": True, "top_logprobs": 3}),
    (CHAT, {"messages": POEM, "n": 3, "stop": "the", "logprobs": True}),
    (CHAT, {"messages": POEM, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "presence_penalty": 0.5, "n": 3}),
    (CHAT, {"messages": POEM, "n": 3, "logprobs": True, "top_logprobs": 1, "temperature": 4}),
    (CHAT, {"messages": POEM, "temperature": 0, "logit_bias": {"28": -100}, "logprobs": True}),
]


@pytest.mark.parametrize(("route", "fields"), REQUESTS)
def test_a_stream_is_the_whole_answer(embedded_server: Server, route: str, fields: dict[str, Any]) -> None:
    body = SAMPLED | fields
    url = embedded_server.url + route
    ask_for_chunks = {"stream": True, "stream_options": {"include_usage": True}}
    # The stream first and last: what the prefix cache holds by then must not show.
    first = streamed(url, body | ask_for_chunks)
    answer = httpx.post(url, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    second = streamed(url, body | ask_for_chunks)

    for choices, usage in (first, second):
        assert choices == {choice["index"]: comparable(choice) for choice in whole["choices"]}
        assert without_cache(usage) == without_cache(whole["usage"])
    num_samples = len(whole["choices"])
    if num_samples > 1:
        assert len({choice["text"] for choice in first[0].values()}) > 1, "samples differ"


def comparable(choice: dict[str, Any]) -> dict[str, Any]:
    """What a whole choice and a stream's have in common, in one shape for both routes."""
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return {"text": text, "logprobs": choice["logprobs"], "finish_reason": choice["finish_reason"]}


def streamed(url: str, body: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """The choices that a stream's pieces add up to, and its usage."""
    lines = httpx.post(url, json=body, timeout=120).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert last["choices"] == []
    texts: defaultdict[int, str] = defaultdict(str)
    logprobs: dict[int, dict[str, Any] | None] = defaultdict(lambda: None)
    reasons: dict[int, str] = {}
    for chunk in chunks:
        assert chunk["usage"] is None
        (piece,) = chunk["choices"]
        index = piece["index"]
        assert index not in reasons, "nothing comes after an answer's end"
        texts[index] += piece["text"] if "text" in piece else piece["delta"].get("content", "")
        for name, entries in (piece["logprobs"] or {}).items():
            known = logprobs[index] = logprobs[index] or {}
            known[name] = None if entries is None else [*known.get(name, []), *entries]
        if piece["finish_reason"] is not None:
            reasons[index] = piece["finish_reason"]
    choices = {
        index: {"text": texts[index], "logprobs": logprobs[index], "finish_reason": reasons[index]}
        for index in texts
    }
    return choices, last["usage"]


def without_cache(usage: dict[str, Any]) -> dict[str, Any]:
    """``cached_tokens`` depends on what was asked before, and may."""
    return {name: count for name, count in usage.items() if name != "prompt_tokens_details"}
