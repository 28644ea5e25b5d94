"""Structured output through a real server and OpenAI's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from tests.structured.schemas import SCHEMAS, check_answer

from .conftest import EMBEDDED_MODEL, Server

MESSAGES = [{"role": "user", "content": "Describe a person as JSON."}]


class Person(BaseModel):
    name: str
    age: int
    is_tall: bool


@pytest.fixture
def client(embedded_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedded_server.url}/v1", api_key="none", timeout=300) as client:
        yield client


def test_parse_fills_a_pydantic_model(client: openai.OpenAI) -> None:
    """Its schema comes with strict: true, titles and all."""
    completion = client.chat.completions.parse(
        model=EMBEDDED_MODEL, messages=MESSAGES, response_format=Person, temperature=0, max_tokens=100
    )
    assert isinstance(completion.choices[0].message.parsed, Person)


def test_streams_samples_logprobs_and_stop(client: openai.OpenAI) -> None:
    pattern = r"[a-z]{3,12}=\d{1,4};"
    stream = client.chat.completions.create(
        model=EMBEDDED_MODEL,
        messages=MESSAGES,
        n=3,
        seed=4,
        stop=[";"],
        logprobs=True,
        max_tokens=40,
        stream=True,
        extra_body={"structured_outputs": {"regex": pattern}},
    )
    texts, spelled = [""] * 3, [b""] * 3
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            for token in choice.logprobs.content or [] if choice.logprobs else []:
                spelled[choice.index] += bytes(token.bytes or [])
    assert all(re.fullmatch(pattern, text + ";") for text in texts), texts
    assert len(set(texts)) > 1
    for text, data in zip(texts, spelled, strict=True):
        assert data.decode().startswith(text + ";")


def test_many_at_once(client: openai.OpenAI) -> None:
    """Valid answers, and refused grammars between them."""
    names = [name for name in SCHEMAS if name != "recursion"]

    def ask(name: str) -> ChatCompletion:
        return client.chat.completions.create(
            model=EMBEDDED_MODEL,
            messages=MESSAGES,
            max_tokens=300,
            seed=1,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMAS.get(name, {"not": {}})},
            },
        )

    with ThreadPoolExecutor(len(names) + 4) as clients:
        refused = [clients.submit(ask, "unknown") for _ in range(4)]
        answers = list(clients.map(ask, names))
        for future in refused:
            assert isinstance(future.exception(), openai.BadRequestError)
    for name, answer in zip(names, answers, strict=True):
        content = answer.choices[0].message.content
        assert content is not None
        assert answer.choices[0].finish_reason == "stop"
        assert json.loads(content) is not None
        check_answer(content, SCHEMAS[name])
