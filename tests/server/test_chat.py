"""``/v1/chat/completions``, through the ``openai`` package where it can send it."""

from __future__ import annotations

import openai
import pytest

from .fakes import ANSWER, EOS, MAX_MODEL_LEN, MODEL, RunningServer

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_answer(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "system", "content": "Kurz."}, {"role": "user", "content": "Hi"}]
    )
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert (choice.message.refusal, choice.logprobs) == (None, None)
    assert choice.finish_reason == "stop"
    ((prompt, sampling),) = server.engine.requests.values()
    assert bytes(prompt) == b"system: Kurz.\nuser: Hi\nassistant: "
    assert sampling.max_tokens == MAX_MODEL_LEN - len(prompt)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def test_an_answer_can_be_sent_back(server: RunningServer) -> None:
    """As clients keep a conversation: with all the nulls that the ``openai`` package adds."""
    answer = server.openai.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3)
    conversation = [*MESSAGES, answer.choices[0].message.model_dump(), {"role": "user", "content": "Und?"}]
    server.openai.chat.completions.create(model=MODEL, messages=conversation)
    prompt, _ = list(server.engine.requests.values())[-1]
    assert bytes(prompt) == b"user: Hi\nassistant: Ein\nuser: Und?\nassistant: "


def test_kinds_of_content(server: RunningServer) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "name": "Eva", "content": ""},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
    ]
    assert server.http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    ((prompt, _),) = server.engine.requests.values()
    assert bytes(prompt) == b"developer: a\nb\nuser: \nassistant: \nassistant: \nassistant: "


@pytest.mark.parametrize(
    "limits",
    [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}],
)
def test_both_names_of_max_tokens(server: RunningServer, limits: dict[str, int]) -> None:
    response = server.http.post("/v1/chat/completions", json={"messages": MESSAGES, **limits})
    (choice,) = response.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Ein", "length")


def test_n(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, seed=12, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == len(b"user: Hi\nassistant: ")


def test_logprobs(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=100
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.refusal is None
    assert logprobs.content is not None
    first = logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("E", -1.5, [ord("E")])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("F", -0.25), ("E", -1.5)]
    assert bytes(byte for entry in logprobs.content for byte in entry.bytes or []) == (ANSWER + EOS).encode()
    half_a_character = logprobs.content[ANSWER.encode().index(0xC3)]
    assert (half_a_character.token, half_a_character.bytes) == ("\ufffd", [0xC3])


def test_logprobs_of_minus_infinity(server: RunningServer) -> None:
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3, "max_tokens": 1}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    (entry,) = response.json()["choices"][0]["logprobs"]["content"]
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.25, -1.5, -9999.0]


def test_logprobs_without_top(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, max_tokens=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].top_logprobs == []


def test_errors_reach_the_client_library(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        server.openai.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert (error.value.param, error.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as not_found:
        server.openai.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError, match="the step raised"):
        server.openai.completions.create(model=MODEL, prompt="[fail]")
