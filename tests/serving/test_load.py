"""Many clients at once, and clients that leave: everybody is served, and no block stays behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.serving.conftest import EMBEDDED_MODEL, Server, serving
from tests.tiny_model import write_tiny_model

CHAT = {"model": EMBEDDED_MODEL, "messages": [{"role": "user", "content": "Tell me about the sea."}]}


async def until_idle(client: httpx.AsyncClient) -> dict[str, object]:
    """The health report once nothing runs any more; the test fails if that doesn't come."""
    for _ in range(600):
        health = (await client.get("/health")).json()
        if health["num_running"] == health["num_waiting"] == 0:
            return health
        await asyncio.sleep(0.05)
    pytest.fail(f"still busy after 30 s: {health}")


def connect(server: Server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits)


def test_fifty_clients_at_once(embedded_server: Server) -> None:
    async def ask_all() -> None:
        async with connect(embedded_server) as client:
            body = {"model": EMBEDDED_MODEL, "prompt": "Count:", "temperature": 0, "ignore_eos": True}
            requests = [
                client.post("/v1/completions", json={**body, "max_tokens": 5 + i % 10, "stream": i % 2 == 0})
                for i in range(50)
            ]
            answers = await asyncio.gather(*requests)
            assert [answer.status_code for answer in answers] == [200] * 50
            for i, answer in enumerate(answers):
                if i % 2 == 0:
                    assert answer.text.endswith("data: [DONE]\n\n")
                else:
                    assert answer.json()["usage"]["completion_tokens"] == 5 + i % 10
            assert (await until_idle(client))["kv_cache_usage"] == 0.0

    asyncio.run(ask_all())


def test_a_hundred_clients_that_leave(embedded_server: Server) -> None:
    """Half of them stream and leave after their first text; the others never get an answer's head."""

    async def leave(client: httpx.AsyncClient, is_streaming: bool) -> None:
        body = {**CHAT, "max_tokens": 2000, "ignore_eos": True, "stream": is_streaming}
        if is_streaming:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if '"content":""' not in line and '"content"' in line:
                        return
        else:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(300, read=5))

    async def all_leave() -> None:
        async with connect(embedded_server) as client:
            await asyncio.gather(*(leave(client, i % 2 == 0) for i in range(100)))
            assert (await until_idle(client))["kv_cache_usage"] == 0.0
            answer = await client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 3})
            assert answer.status_code == 200

    asyncio.run(all_leave())


def test_a_long_prompt_does_not_stop_the_others(tmp_path: Path) -> None:
    """A running stream gets tokens while a prompt of 3,000 tokens is read."""

    async def run(server: Server) -> None:
        async with connect(server) as client:
            body = {"prompt": [5, 6], "max_tokens": 4000, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                await anext(lines)
                long = asyncio.create_task(
                    client.post("/v1/completions", json={"prompt": [7] * 3000, "max_tokens": 1})
                )
                num_between = 0
                async for line in lines:
                    num_between += line.startswith("data: {")
                    if long.done():
                        break
                assert (await long).status_code == 200
                # 3,000 tokens are six steps of 512, and each brings the stream a token. In one step of its
                # own the prompt would leave room for one or two; the rest of six is for when it began.
                assert num_between >= 4
            assert (await until_idle(client))["kv_cache_usage"] == 0.0

    with serving("--model", write_tiny_model(tmp_path), "--load-format", "dummy") as server:
        asyncio.run(run(server))
