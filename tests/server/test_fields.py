"""Fields of a request that change what is asked of the engine, or how the answer is worded."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.request import (
    DEFAULT_TERMS,
    EngineEvent,
    FinishReason,
    RequestMetrics,
    SamplingParams,
    Terms,
    TokenLogprob,
)
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.tokenizer.tokenizer import Tokenizer

from .fakes import ANSWER, BOS, MODEL, FakeEngine, RunningServer, make_tokenizer, run_server, served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


def complete(server: RunningServer, **fields: Any) -> dict[str, Any]:
    response = server.http.post(COMPLETIONS, json={"prompt": "ab", "max_tokens": 3, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(server: RunningServer, route: str, **fields: Any) -> list[dict[str, Any]]:
    lines = server.http.post(route, json={"stream": True, **fields}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def asked(server: RunningServer) -> tuple[list[int], SamplingParams]:
    """What the engine was asked for."""
    ((prompt, sampling),) = server.engine.requests.values()
    return prompt, sampling


def test_logit_bias_reaches_the_engine(server: RunningServer) -> None:
    complete(server, logit_bias={"65": 1, "66": -100.0})
    assert asked(server)[1].logit_bias == {65: 1.0, 66: -100.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"prompt_cache_key": "x", "prompt_cache_retention": "24h", "safety_identifier": "y"},
    ],
)
def test_fields_that_do_no_harm(server: RunningServer, fields: dict[str, Any]) -> None:
    assert complete(server, **fields)["choices"][0]["text"] == ANSWER[:3]


def test_priority_reaches_the_engine(server: RunningServer) -> None:
    complete(server, priority=-7)
    assert list(server.engine.terms.values())[-1].priority == -7


def test_truncation_keeps_the_end(server: RunningServer) -> None:
    answer = complete(server, prompt="abcdef", truncate_prompt_tokens=2)
    assert asked(server)[0] == [*b"ef"]
    assert answer["usage"]["prompt_tokens"] == 2


def test_cached_tokens_are_told(server: RunningServer) -> None:
    """Once for each prompt, however many answers it has."""
    usage = complete(server, prompt=["abcd", "ab"], n=2)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2 + 1}
    last = stream(server, COMPLETIONS, prompt="abcd", stream_options={"include_usage": True})[-1]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_special_tokens_are_shown_on_request(server: RunningServer) -> None:
    assert complete(server, ignore_eos=True)["choices"][0]["text"] == ANSWER[:2]
    answer = complete(server, ignore_eos=True, skip_special_tokens=False)
    assert answer["choices"][0]["text"] == "<|end|>" + ANSWER[:2]


def test_the_stop_string_is_shown_on_request(server: RunningServer) -> None:
    for shows, text in ((False, "Ein sch"), (True, "Ein schön")):
        answer = complete(server, max_tokens=20, stop="ön", include_stop_str_in_output=shows)
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (text, "stop")


# echo, and the prompt's own log probabilities


@pytest.mark.parametrize("prompt", ["añb", [*"añb".encode()]])
def test_echo_begins_with_the_prompt(server: RunningServer, prompt: Any) -> None:
    assert complete(server, prompt=prompt, echo=True)["choices"][0]["text"] == "añbEin"


def test_echo_with_logprobs(server: RunningServer) -> None:
    """What evaluation harnesses send: nothing is known of the first token, offsets run on into the answer."""
    answer = complete(server, prompt=[97, 98, 99], echo=True, logprobs=1, max_tokens=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "E"]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -1.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"\x07": -0.5, "b": -1.0}
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 1


def test_a_prompt_is_scored_without_an_answer(server: RunningServer) -> None:
    answer = complete(server, prompt="abc", echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_streams_the_same(server: RunningServer, max_tokens: int) -> None:
    fields: dict[str, Any] = {"prompt": ["ab", "cde"], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    whole = complete(server, **fields)["choices"]
    chunks = stream(server, COMPLETIONS, **fields)
    for index, choice in enumerate(whole):
        pieces = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"] == "length"
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            found = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"][name]]
            assert found == choice["logprobs"][name]


def test_prompt_logprobs_as_vllm_words_them(server: RunningServer) -> None:
    (choice,) = complete(server, prompt="ab", prompt_logprobs=1)["choices"]
    want = [
        None,
        {
            "98": {"logprob": -1.0, "rank": 1, "decoded_token": "b"},
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": "\x07"},
        },
    ]
    assert choice["prompt_logprobs"] == want
    assert choice["logprobs"] is None
    answer = server.http.post(CHAT, json={"messages": [USER], "prompt_logprobs": 0}).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in answer["choices"][0]


@pytest.mark.parametrize(("logprobs", "num_prompt_logprobs"), [(0, 2), (1, 0), (2, 1), (1, 1)])
def test_echo_and_prompt_logprobs_have_a_number_each(
    server: RunningServer, logprobs: int, num_prompt_logprobs: int
) -> None:
    """The engine is asked once, for the greater."""
    fields = {"prompt": "ab", "echo": True, "logprobs": logprobs, "prompt_logprobs": num_prompt_logprobs}
    (choice,) = complete(server, **fields, max_tokens=1)["choices"]
    assert choice["prompt_logprobs"][1].keys() == {"98", *["7", "0"][:num_prompt_logprobs]}
    assert choice["logprobs"]["top_logprobs"][1].keys() == {"b", *["\x07", "\x00"][:logprobs]}


@pytest.mark.parametrize("wrong", [-1, 21])
def test_a_wrong_number_is_refused_beside_the_other(server: RunningServer, wrong: int) -> None:
    for name, other in (("logprobs", "prompt_logprobs"), ("prompt_logprobs", "logprobs")):
        body = {"prompt": "ab", "echo": True, name: wrong, other: 1}
        answer = server.http.post(COMPLETIONS, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_what_is_impossible_in_a_prompt(server: RunningServer) -> None:
    """JSON has no minus infinity."""
    fields: dict[str, Any] = {"prompt": [97, 0], "max_tokens": 1}
    (choice,) = complete(server, **fields, prompt_logprobs=2)["choices"]
    found = {token_id: entry["logprob"] for token_id, entry in choice["prompt_logprobs"][1].items()}
    assert found == {"0": -9999.0, "7": -0.5}
    (choice,) = complete(server, **fields, prompt_logprobs=0)["choices"]
    assert choice["prompt_logprobs"][1]["0"]["logprob"] == -9999.0
    (choice,) = complete(server, **fields, echo=True, logprobs=0)["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -9999.0, -1.5]


# best_of


class UnequalEngine(FakeEngine):
    """Each sample says its number, ``lengths`` times, and ``logprobs`` has how likely that is."""

    logprobs = (-3.0, -1.0, -2.0, -2.0, -1.0, -3.0)
    lengths = (1, 3, 1, 3, 1, 3)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        terms: Terms = DEFAULT_TERMS,
    ) -> AsyncGenerator[EngineEvent, None]:
        number = int(request_id.rpartition("-")[2])
        token, length = ord("0") + number, self.lengths[number]
        metrics = RequestMetrics(num_cached_tokens=len(prompt_token_ids) // 2)
        event = EngineEvent(request_id, [token] * length, None, FinishReason.LENGTH, metrics=metrics)
        if sampling.logprobs is not None:
            event.logprobs = [TokenLogprob(token, self.logprobs[number], [])] * length
        yield event


def test_best_of_answers_with_the_likeliest(tokenizer: Tokenizer) -> None:
    """On average over their tokens, the best first; the tokens of those left out are counted, too."""
    engine = UnequalEngine(tokenizer)
    with run_server(create_app(engine, tokenizer, ServerConfig(), MODEL, ServerState())) as port:
        server = RunningServer(engine, port)
        answer = complete(server, prompt=["ab", "cd"], best_of=3, n=2)
        server.close()
    assert [choice["text"] for choice in answer["choices"]] == ["111", "2", "4", "333"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_best_of_with_prompt_logprobs(server: RunningServer) -> None:
    """Each choice has its prompt's, however many answers were left out."""
    answer = complete(server, prompt=["ab", "cd"], best_of=3, n=2, prompt_logprobs=0)
    found = [[*choice["prompt_logprobs"][1]] for choice in answer["choices"]]
    assert found == [[str(ord(char))] for char in "bbdd"]


def test_best_of_with_logprobs(server: RunningServer) -> None:
    (choice,) = complete(server, best_of=2, logprobs=1)["choices"]
    assert len(choice["logprobs"]["tokens"]) == 3


# chat


def test_an_answer_goes_on_with_the_last_message(server: RunningServer) -> None:
    messages = [USER, {"role": "assistant", "content": "It is "}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert server.http.post(CHAT, json=body).status_code == 200
    assert bytes(asked(server)[0]).decode() == "user: Hi\nassistant: It is "


def test_no_generation_prompt(server: RunningServer) -> None:
    assert server.http.post(CHAT, json={"messages": [USER], "add_generation_prompt": False}).is_success
    assert bytes(asked(server)[0]).decode() == "user: Hi\n"


# special tokens around a prompt


@pytest.fixture(scope="module")
def bos_port() -> Iterator[int]:
    """Of a server whose tokenizer adds a token."""
    with served(ServerConfig(), tokenizer=make_tokenizer(adds_bos=True)) as port:
        yield port


@pytest.mark.parametrize(
    ("path", "body", "num_tokens", "adds_by_itself"),
    [
        (COMPLETIONS, {"prompt": "ab"}, 2, True),
        (CHAT, {"messages": [USER]}, len("user: Hi\nassistant: "), False),
        ("/tokenize", {"prompt": "ab"}, 2, True),
        ("/tokenize", {"messages": [USER]}, len("user: Hi\nassistant: "), False),
    ],
    ids=["completions", "chat", "tokenize a prompt", "tokenize messages"],
)
def test_special_tokens_around_a_prompt(
    bos_port: int, path: str, body: dict[str, Any], num_tokens: int, adds_by_itself: bool
) -> None:
    for value, is_added in ((None, adds_by_itself), (True, True), (False, False)):
        given = {} if value is None else {"add_special_tokens": value}
        answer = httpx.post(f"http://127.0.0.1:{bos_port}{path}", json=body | given, timeout=10).json()
        found = answer["count"] if "count" in answer else answer["usage"]["prompt_tokens"]
        assert found == num_tokens + is_added, value


def test_a_special_token_spelled_out_in_a_prompt(server: RunningServer) -> None:
    assert complete(server, prompt=BOS)["usage"]["prompt_tokens"] == 1


# usage in every chunk


@pytest.mark.parametrize("include_usage", [False, True])
def test_every_chunk_counts(server: RunningServer, include_usage: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    chunks = stream(server, COMPLETIONS, prompt="ab", max_tokens=3, n=2, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)
    assert (chunks[-1]["choices"] == []) == include_usage
    if include_usage:
        assert chunks[-1]["usage"] == complete(server, n=2)["usage"], "with its details"


def test_unknown_fields_are_ignored_on_request(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """--ignore-unknown-fields: what isn't known or supported is dropped and logged once, the rest checked."""
    config = ServerConfig(ignore_unknown_fields=True)
    engine = FakeEngine(tokenizer)
    app = create_app(engine, tokenizer, config, MODEL, ServerState())
    with run_server(app, config) as port:
        server = RunningServer(engine, port)
        for _ in range(2):
            assert complete(server, temprature=5, suffix="x")["choices"][0]["text"] == ANSWER[:3]
        assert server.http.post(COMPLETIONS, json={"prompt": "a", "temperature": -1}).status_code == 400
        assert server.http.post(COMPLETIONS, json=[1]).status_code == 400
        assert server.http.post("/tokenize", json={"prompt": "ab", "xyz": 1}).json()["count"] == 2
        part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
        history = [
            {"role": "user", "content": [part]},
            {"role": "assistant", "content": "b", "annotations": []},
            {"role": "user", "content": "c"},
        ]
        body = {"messages": history, "max_tokens": 1, "stream_options": {"x": 1}, "stream": True}
        assert server.http.post(CHAT, json=body).status_code == 200
        assert server.http.post(CHAT, json={**body, "messages": [{"role": "user"}]}).status_code == 400
        server.close()
    messages = [record.getMessage() for record in caplog.records if "is ignored" in record.getMessage()]
    assert sorted(messages) == [
        "/tokenize: the field 'xyz' is ignored",
        "/v1/chat/completions: the field 'annotations' is ignored",
        "/v1/chat/completions: the field 'cache_control' is ignored",
        "/v1/chat/completions: the field 'x' is ignored",
        "/v1/completions: the field 'suffix' is ignored",
        "/v1/completions: the field 'temprature' is ignored",
    ]


def test_no_more_than_so_many_ignored_fields_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A client that makes up names fills no disk."""
    names = dict.fromkeys((f"field_{number}" for number in range(150)), 1)
    with served(ServerConfig(ignore_unknown_fields=True)) as port:
        for _ in range(2):
            answer = httpx.post(
                f"http://127.0.0.1:{port}{COMPLETIONS}", json={"prompt": "ab", **names}, timeout=10
            )
            assert answer.status_code == 200
    assert sum("is ignored" in record.getMessage() for record in caplog.records) == 100
