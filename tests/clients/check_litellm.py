"""litellm: chat and text completions, whole and streamed, as of OpenAI and of vLLM; and its errors."""

from __future__ import annotations

import asyncio
import os

import litellm

litellm.suppress_debug_info = True  # it prints its list of providers where it knows no price
NAME = "SmolLM2-135M-Instruct"
BASE = {
    "api_base": os.environ["MINIVLLM_URL"] + "/v1",
    "api_key": "none",
    "temperature": 0,
    "num_retries": 0,
}
MESSAGES = [{"role": "user", "content": "Name the capital of France."}]
ANSWER = "The capital of France is Paris."

for provider in ("openai", "hosted_vllm"):
    ask = {**BASE, "model": f"{provider}/{NAME}", "messages": MESSAGES}
    whole = litellm.completion(**ask)
    assert whole.choices[0].message.content == ANSWER, whole
    assert whole.choices[0].finish_reason == "stop", whole
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (36, 8), whole.usage

    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert len(chunks) >= 8, "text comes token by token"
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert (rebuilt.usage.prompt_tokens, rebuilt.usage.completion_tokens) == (36, 8), rebuilt.usage

    assert litellm.completion(**ask, stop=["France"]).choices[0].message.content == "The capital of "
    several, again = (
        [choice.message.content for choice in litellm.completion(**ask, n=3, seed=5, max_tokens=12).choices]
        for ask in [{**ask, "temperature": 1.5}] * 2
    )
    assert several == again, (several, again)
    assert len(set(several)) == 3, several

    likely = litellm.completion(**ask, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert "".join(entry.token for entry in likely.content).startswith(ANSWER), likely

    try:
        litellm.completion(**ask | {"temperature": 101})
    except litellm.BadRequestError as error:
        assert "temperature must be at most 100.0, got 101.0" in str(error), error
    else:
        raise AssertionError("a temperature of 101 must be refused")
    try:
        litellm.completion(**ask | {"messages": [{"role": "user", "content": "word " * 9000}]})
    except litellm.ContextWindowExceededError as error:
        assert "8192" in str(error), error
    else:
        raise AssertionError("a prompt longer than the context must be refused")
    try:
        litellm.completion(**ask | {"model": f"{provider}/another-model"})
    except litellm.NotFoundError as error:
        assert "another-model" in str(error), error
    else:
        raise AssertionError("another model must be refused")

ask = {
    **BASE,
    "model": f"text-completion-openai/{NAME}",
    "prompt": "The capital of France is",
    "max_tokens": 6,
}
text = litellm.text_completion(**ask)
assert "Paris" in text.choices[0].text, text
assert text.usage.completion_tokens == 6, text.usage
assert "".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**ask, stream=True)) == (
    text.choices[0].text
)
echoed = litellm.text_completion(**ask, echo=True, logprobs=1)
assert echoed.choices[0].text == ask["prompt"] + text.choices[0].text, echoed
assert echoed.choices[0].logprobs.token_logprobs[0] is None, echoed


async def check_async() -> None:
    ask = {**BASE, "model": f"openai/{NAME}", "messages": MESSAGES}
    answers = await asyncio.gather(*(litellm.acompletion(**ask) for _ in range(3)))
    assert [answer.choices[0].message.content for answer in answers] == [ANSWER] * 3
    chunks = [chunk async for chunk in await litellm.acompletion(**ask, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


asyncio.run(check_async())
