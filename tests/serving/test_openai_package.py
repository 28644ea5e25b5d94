"""The ``openai`` package against the running server: what its users do, and what they get.

``test_older_openai_package`` runs this whole file again under the package's previous major version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest

from tests.serving.conftest import EMBEDDED_MODEL, ROOT, Server

URL = "MINIVLLM_TEST_URL"
"""Set: test the server there, instead of starting one."""
CAPITAL = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest) -> str:
    return os.environ.get(URL) or request.getfixturevalue("embedded_server").url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [EMBEDDED_MODEL]
    assert client.models.retrieve(EMBEDDED_MODEL).id == EMBEDDED_MODEL


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=EMBEDDED_MODEL, messages=CAPITAL, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 36
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == 44


def test_chat_streamed_equals_chat(client: openai.OpenAI) -> None:
    ask = {"model": EMBEDDED_MODEL, "messages": CAPITAL, "max_tokens": 40, "temperature": 0.9, "seed": 11}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completion_of_text_and_ids(client: openai.OpenAI, url: str) -> None:
    import httpx

    ids = httpx.post(f"{url}/tokenize", json={"prompt": "The capital of France is"}).json()["tokens"]
    ask = {"model": EMBEDDED_MODEL, "max_tokens": 6, "temperature": 0}
    from_text = client.completions.create(prompt="The capital of France is", **ask)
    from_ids = client.completions.create(prompt=ids, **ask)
    from_batch = client.completions.create(prompt=[ids, ids], **ask)
    assert "Paris" in from_text.choices[0].text
    assert from_ids.choices[0].text == from_text.choices[0].text
    assert [choice.text for choice in from_batch.choices] == [from_text.choices[0].text] * 2
    assert [choice.index for choice in from_batch.choices] == [0, 1]
    assert from_batch.usage.prompt_tokens == 2 * len(ids)


def test_completion_streamed(client: openai.OpenAI) -> None:
    ask = {"model": EMBEDDED_MODEL, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) >= 12, "text comes token by token"


def test_n_gives_different_samples_that_repeat(client: openai.OpenAI) -> None:
    ask = {"model": EMBEDDED_MODEL, "prompt": "My favourite", "max_tokens": 12, "n": 4, "seed": 5}
    first, second = (client.completions.create(**ask) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 4
    assert texts == [choice.text for choice in second.choices]
    assert first.usage.completion_tokens == 48


def test_seed_decides(client: openai.OpenAI) -> None:
    ask = {"model": EMBEDDED_MODEL, "prompt": "My favourite", "max_tokens": 16}
    texts = [client.completions.create(**ask, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    unseeded = {client.completions.create(**ask).choices[0].text for _ in range(3)}
    assert len(unseeded) > 1


def test_stop_string_across_token_edges(client: openai.OpenAI) -> None:
    ask = {"model": EMBEDDED_MODEL, "messages": CAPITAL, "temperature": 0}
    # The tokens are "The", " capital", " of", " France", " is", " Paris", ".": these cut through them.
    for stop, expected in [
        ("nce is Par", "The capital of Fra"),
        ("ital o", "The cap"),
        (["is", "of F"], "The capital "),
    ]:
        answer = client.chat.completions.create(**ask, stop=stop)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
        chunks = client.chat.completions.create(**ask, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_max_tokens_ends_with_length(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        answer = client.chat.completions.create(
            model=EMBEDDED_MODEL, messages=CAPITAL, temperature=0, **limit
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=EMBEDDED_MODEL, messages=CAPITAL, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content[:7]) == answer.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob, "greedy takes the most likely"
        assert token.logprob <= 0.0
        assert bytes(token.bytes).decode() == token.token

    completion = client.completions.create(
        model=EMBEDDED_MODEL, prompt="The sea", max_tokens=5, temperature=0, logprobs=2
    )
    logprobs = completion.choices[0].logprobs
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 5
    assert logprobs.text_offset[0] == 0


def test_tools_that_the_model_may_call(client: openai.OpenAI) -> None:
    """Its chat template shows no tools, so it is told of them in words; what it then says is up to it."""
    tool = {"type": "function", "function": {"name": "get_time", "description": "The time of day."}}
    ask = {"model": EMBEDDED_MODEL, "messages": CAPITAL, "temperature": 0, "tools": [tool], "max_tokens": 48}
    with_tools = client.chat.completions.create(**ask)
    assert with_tools.usage.prompt_tokens > 36
    with client.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == with_tools.choices[0].message.content
    without = client.chat.completions.create(**ask, tool_choice="none")
    assert without.choices[0].message.content == "The capital of France is Paris."
    assert without.usage.prompt_tokens == 36


def test_tools_that_the_model_must_call(client: openai.OpenAI) -> None:
    """Its answers follow the functions' schemas, though it was never trained to call any."""
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
    }
    weather = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    clock = {"type": "function", "function": {"name": "get_time"}}
    ask = {
        "model": EMBEDDED_MODEL,
        "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
        "tools": [clock, weather],
        "parallel_tool_calls": False,
    }
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, seed in [("required", 1), (named, 2)]:
        limits = {"tool_choice": choice, "seed": seed, "temperature": 1.5, "max_tokens": 200}
        answer = client.chat.completions.create(**ask, **limits).choices[0]
        with client.chat.completions.stream(**ask, **limits) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert answer.finish_reason == streamed.finish_reason == "tool_calls"
        assert answer.message.content is None
        (call,), (same,) = answer.message.tool_calls, streamed.message.tool_calls
        assert (call.function.name, call.function.arguments) == (same.function.name, same.function.arguments)
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_time":
            assert choice == "required"
            assert arguments == {}
        else:
            assert arguments.keys() == {"city", "unit"}
            assert len(arguments["city"]) <= 20
            assert arguments["unit"] in ("celsius", "fahrenheit")
    bad = {"type": "object", "properties": {"a": {"not": {}}}}
    tools = [clock, {"type": "function", "function": {"name": "f", "parameters": bad}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{**ask, "tools": tools}, tool_choice="required")
    assert refused.value.param == "tools[1].function.parameters"


def test_errors_are_the_package_s_own(client: openai.OpenAI) -> None:
    ask = {"model": EMBEDDED_MODEL, "messages": CAPITAL}
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="gpt-5", messages=CAPITAL)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as out_of_range:
        client.chat.completions.create(**ask, temperature=-1)
    assert out_of_range.value.param == "temperature"
    assert "-1" in out_of_range.value.message
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=EMBEDDED_MODEL, prompt=[100] * 9000)
    assert too_long.value.code == "context_length_exceeded"
    assert "8192" in too_long.value.message
    assert "9000" in too_long.value.message
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(**ask, verbosity="low")
    assert unsupported.value.param == "verbosity"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(**ask, extra_body={"temprature": 1})
    assert "temperature" in unknown.value.message


@pytest.mark.skipif(URL in os.environ, reason="runs the others")
def test_older_openai_package(embedded_server: Server) -> None:
    older = ROOT / ".venv" / "openai-2"
    if not older.is_dir():
        pytest.skip("`make test` installs the previous major version of openai into .venv/openai-2")
    env = {**os.environ, URL: embedded_server.url}
    env["PYTHONPATH"] = os.pathsep.join([str(older), str(ROOT), str(ROOT / "kernels")])
    version = [sys.executable, "-c", "import openai; print(openai.__version__)"]
    assert subprocess.run(version, env=env, capture_output=True, text=True).stdout.startswith("2.")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
