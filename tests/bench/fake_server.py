"""A server with OpenAI's routes that says what it is told to, when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from minivllm_bench.client import Client


@dataclass
class Reply:
    """An answer: a status, and bytes, each with the seconds to wait before it."""

    parts: Sequence[tuple[float, bytes]] = ()
    status: int = 200
    content_type: str = "text/event-stream"
    is_cut: bool = False
    """The connection is reset after the last part."""
    hangs: bool = False
    """Nothing comes after the last part, and no end."""


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def text_event(text: str, *, finish_reason: str | None = None, is_chat: bool = False) -> bytes:
    what = {"delta": {"content": text}} if is_chat else {"text": text}
    return event({"choices": [{"index": 0, **what, "finish_reason": finish_reason}]})


def usage_event(prompt: int, completion: int, cached: int | None = None) -> bytes:
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": usage})


DONE = event(b"[DONE]")


def answer(body: dict[str, Any], gaps: Sequence[float] = ()) -> Reply:
    """As many words as were asked for, each after its gap; a usage of a token for each word."""
    count = body["max_tokens"]
    words = [f" {chr(97 + i % 26)}{i}" for i in range(count)]
    is_chat = "messages" in body
    waits = list(gaps) or [0.0] * count
    parts = [
        (wait, text_event(word, finish_reason="length" if i == count - 1 else None, is_chat=is_chat))
        for i, (wait, word) in enumerate(zip(waits, words, strict=True))
    ]
    said = body["prompt"] if "prompt" in body else " ".join(m["content"] for m in body["messages"])
    return Reply([*parts, (0.0, usage_event(len(said.split()), count)), (0.0, DONE)])


@dataclass
class FakeServer:
    """What it says is up to ``reply``, which is given each request's body."""

    reply: Callable[[dict[str, Any]], Reply] = answer
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_under_way: int = 0
    most_under_way: int = 0
    models: Reply | None = None
    """Of /v1/models; None: there is one model, "fake"."""
    dies_after: int | None = None
    """From this request on, the probe's among them, it cuts all connections and takes no more."""
    hangs: threading.Event = field(default_factory=threading.Event)
    """Set while a request hangs."""
    crowd: int = 1
    """No answer but the first, the probe's, begins before so many requests have been under way at once."""
    is_crowded: asyncio.Event = field(default_factory=asyncio.Event)
    site: web.BaseSite | None = None

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if self.models is not None:
            return await self._send(request, self.models)
        return web.json_response({"object": "list", "data": [{"id": "fake"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.dies_after is not None and len(self.bodies) > self.dies_after:
            assert self.site is not None
            if len(self.bodies) == self.dies_after + 1:
                await self.site.stop()
            return await self._send(request, Reply(is_cut=True))
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        if self.most_under_way >= self.crowd:
            self.is_crowded.set()
        try:
            if len(self.bodies) > 1 and not self.is_crowded.is_set():
                await asyncio.wait_for(self.is_crowded.wait(), 30)
            return await self._send(request, self.reply(body))
        finally:
            self.num_under_way -= 1

    async def _send(self, request: web.Request, reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.content_type})
        await response.prepare(request)
        for wait, data in reply.parts:
            await asyncio.sleep(wait)
            await response.write(data)
        if reply.hangs:
            self.hangs.set()
            await asyncio.Event().wait()
        if reply.is_cut:
            assert request.transport is not None
            request.transport.abort()
        return response


@contextlib.asynccontextmanager
async def connected(server: FakeServer, **settings: Any) -> AsyncIterator[Client]:
    """The server on a Unix socket in this very loop, and a client of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "s")
        runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        await web.UnixSite(runner, path).start()
        settings = {"model": "fake", "connector": aiohttp.UnixConnector(path, limit=0)} | settings
        try:
            async with Client("http://fake", **settings) as client:
                yield client
        finally:
            await runner.cleanup()


@contextlib.contextmanager
def served(server: FakeServer) -> Iterator[str]:
    """The server on a port of this machine, in a thread; its URL."""
    started: list[str] = []
    is_ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.site = site
        started.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        is_ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    is_ready.wait()
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
