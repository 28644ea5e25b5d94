"""langchain-openai: chat whole, streamed and in batches, usage, stop, logprobs, tools, structured output,
completions, errors.
"""

from __future__ import annotations

import asyncio
import os

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

BASE = {
    "base_url": os.environ["MINIVLLM_URL"] + "/v1",
    "api_key": "none",
    "model": "SmolLM2-135M-Instruct",
    "temperature": 0,
    "max_retries": 0,
}
QUESTION, ANSWER = "Name the capital of France.", "The capital of France is Paris."

chat = ChatOpenAI(**BASE)
answer = chat.invoke(QUESTION)
assert answer.content == ANSWER, answer
assert answer.response_metadata["finish_reason"] == "stop", answer
usage = answer.usage_metadata
assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (36, 8, 44), usage
assert answer.response_metadata["model_name"] == BASE["model"], answer

chunks = list(ChatOpenAI(**BASE, stream_usage=True).stream(QUESTION))
assert "".join(chunk.content for chunk in chunks) == ANSWER, chunks
assert len([chunk for chunk in chunks if chunk.content]) >= 7, "text comes token by token"
counted = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
assert [(count["input_tokens"], count["output_tokens"]) for count in counted] == [(36, 8)], counted

messages = [SystemMessage("You name cities."), HumanMessage(QUESTION)]
assert "Paris" in chat.invoke(messages).content
assert "Paris" in chat.invoke([HumanMessage([{"type": "text", "text": QUESTION}])]).content
assert chat.bind(stop=["France"]).invoke(QUESTION).content == "The capital of "
assert [answer.content for answer in chat.batch([QUESTION] * 3)] == [ANSWER] * 3

short = ChatOpenAI(**BASE, max_tokens=3).invoke(QUESTION)
assert short.response_metadata["finish_reason"] == "length", short
assert short.usage_metadata["output_tokens"] == 3, short

likely = ChatOpenAI(**BASE, logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]
assert "".join(entry["token"] for entry in likely["content"]).startswith(ANSWER), likely
assert all(len(entry["top_logprobs"]) == 2 for entry in likely["content"]), likely

seeded = ChatOpenAI(**BASE | {"temperature": 1}, seed=7, max_tokens=16)
assert seeded.invoke(QUESTION).content == seeded.invoke(QUESTION).content
assert "".join(chunk.content for chunk in seeded.stream(QUESTION)) == seeded.invoke(QUESTION).content


class City(BaseModel):
    """A city."""

    name: str
    is_capital: bool


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return city


found = chat.with_structured_output(City).invoke("Is Paris a capital?")
assert isinstance(found, City), found
called = chat.bind_tools([get_weather], tool_choice="required").invoke("What is the weather in Paris?")
assert called.tool_calls, called
assert all(call["name"] == "get_weather" for call in called.tool_calls), called
assert all(isinstance(call["args"]["city"], str) for call in called.tool_calls), called

completions = OpenAI(**BASE, max_tokens=6)
text = completions.invoke("The capital of France is")
assert "Paris" in text, text
assert "".join(completions.stream("The capital of France is")) == text
generated = OpenAI(**BASE, max_tokens=6, n=2, best_of=2).generate(["The capital of France is", "Two"])
assert [len(texts) for texts in generated.generations] == [2, 2], generated


async def check_async() -> None:
    assert (await chat.ainvoke(QUESTION)).content == ANSWER
    assert "".join([chunk.content async for chunk in chat.astream(QUESTION)]) == ANSWER


asyncio.run(check_async())

try:
    ChatOpenAI(**BASE | {"temperature": 101}).invoke(QUESTION)
except openai.BadRequestError as error:
    assert error.param == "temperature", error
else:
    raise AssertionError("a temperature of 101 must be refused")
