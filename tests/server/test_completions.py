"""``/v1/completions``, through the ``openai`` package where it can send it."""

from __future__ import annotations

import pytest

from .fakes import ANSWER, EOS, MAX_MODEL_LEN, MODEL, RunningServer

NUM_ANSWER_TOKENS = len(ANSWER.encode()) + 1  # and the end token


def test_text(server: RunningServer) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="Hallo", max_tokens=100)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, ANSWER, "stop", None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == NUM_ANSWER_TOKENS
    assert answer.usage.total_tokens == 5 + NUM_ANSWER_TOKENS


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("Hi", [list(b"Hi")]),
        (["Hi", "Du"], [list(b"Hi"), list(b"Du")]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_kinds_of_prompt(server: RunningServer, prompt: object, token_ids: list[list[int]]) -> None:
    response = server.http.post("/v1/completions", json={"prompt": prompt})
    assert response.status_code == 200
    assert [ids for ids, _ in server.engine.requests.values()] == token_ids
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, token_ids))


def test_n_of_several_prompts(server: RunningServer) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt=["ab", "c"], n=3, max_tokens=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert list(server.engine.requests) == [f"{answer.id}-{i}" for i in range(6)]
    assert [bytes(ids) for ids, _ in server.engine.requests.values()] == [b"ab"] * 3 + [b"c"] * 3
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)


def test_seeds_differ_between_samples_and_repeat(server: RunningServer) -> None:
    def texts(n: int) -> list[str]:
        answer = server.openai.completions.create(model=MODEL, prompt="x", n=n, seed=7, max_tokens=3)
        return [choice.text for choice in answer.choices]

    first = texts(4)
    assert len(set(first)) == 4
    assert texts(4) == first
    assert texts(1) == first[:1] == ["007"]


def test_every_sampling_field_reaches_the_engine(server: RunningServer) -> None:
    fields = {
        "max_tokens": 30,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.25,
        "seed": -3,
        "stop": ["##", "@@"],
        "stop_token_ids": [4, 5],
        "ignore_eos": True,
        "logprobs": 2,
    }
    assert server.http.post("/v1/completions", json={"prompt": "x", **fields}).status_code == 200
    ((_, sampling),) = server.engine.requests.values()
    expected = fields | {"stop": ("##", "@@"), "stop_token_ids": (4, 5)}
    assert {name: getattr(sampling, name) for name in fields} == expected
    assert sampling.n == 1


def test_max_tokens_left_open(server: RunningServer) -> None:
    for prompt in ("short", "x" * (MAX_MODEL_LEN - 5)):
        assert server.http.post("/v1/completions", json={"prompt": prompt}).status_code == 200
    assert [sampling.max_tokens for _, sampling in server.engine.requests.values()] == [16, 5]


def test_nulls_count_as_not_given(server: RunningServer) -> None:
    body = {"prompt": "x", "model": None, "stop": None, "n": None, "suffix": None, "stream_options": None}
    assert server.http.post("/v1/completions", json=body).status_code == 200


def test_stop_string_across_tokens_leaves_the_engine(server: RunningServer) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="x", stop="Tag", max_tokens=100)
    assert answer.choices[0].text == "Ein schöner "
    assert answer.choices[0].finish_reason == "stop"
    assert server.engine.closed.get(timeout=5) == f"{answer.id}-0"


def test_logprobs(server: RunningServer) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="x", logprobs=1, max_tokens=100)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[:4] == ["E", "i", "n", " "]
    assert logprobs.tokens[-1] == EOS
    assert logprobs.token_logprobs == [-1.5 - place for place in range(NUM_ANSWER_TOKENS)]
    assert logprobs.top_logprobs is not None
    # The most likely one, and the sampled one.
    assert logprobs.top_logprobs[0] == {"F": -0.25, "E": -1.5}
    # A character of several tokens is there when the last of them is.
    data = ANSWER.encode()
    offsets = [len(data[:place].decode(errors="ignore")) for place in range(NUM_ANSWER_TOKENS)]
    assert logprobs.text_offset == offsets


def test_logprobs_zero_and_minus_infinity(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    response = server.http.post("/v1/completions", json={**body, "logprobs": 0})
    assert response.json()["choices"][0]["logprobs"]["top_logprobs"] == [{"E": -1.5}]
    response = server.http.post("/v1/completions", json={**body, "logprobs": 3})
    assert response.json()["choices"][0]["logprobs"]["top_logprobs"] == [
        {"F": -0.25, "E": -1.5, "G": -9999.0}
    ]


def test_offsets_do_not_count_what_is_not_shown(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 3, "logprobs": 0, "ignore_eos": True}
    (choice,) = server.http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "Ei"
    assert choice["logprobs"]["tokens"] == [EOS, "E", "i"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    (choice,) = server.http.post("/v1/completions", json=body | {"skip_special_tokens": False}).json()[
        "choices"
    ]
    assert choice["text"] == EOS + "Ei"
    assert choice["logprobs"]["text_offset"] == [0, len(EOS), len(EOS) + 1]
