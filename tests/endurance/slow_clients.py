"""Slow clients: a crowd that holds connections and hardly uses them doesn't slow the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.endurance.client import COMPLETIONS, Answer, post, request_head, until_idle
from tests.endurance.findings import Findings
from tests.endurance.processes import Endured, endured_server

MOST_SLOWDOWN = 0.05
_NUM_USERS = 4
_PAUSE = 1.0  # between two bytes
_SLOW_TOKENS = 400


@dataclass(frozen=True)
class Crowd:
    """How many there are of each kind."""

    idle: int = 1000
    """They connect, and send nothing."""
    half_open: int = 100
    """They send their request's head a byte a second."""
    slow_bodies: int = 50
    slow_readers: int = 50
    """They read their stream a byte a second."""


@asynccontextmanager
async def _gathered(port: int, crowd: Crowd) -> AsyncIterator[list[socket.socket]]:
    """The crowd, for as long as this lasts; yields the readers' connections."""
    loop = asyncio.get_running_loop()
    sockets: list[socket.socket] = []
    tasks: list[asyncio.Task[None]] = []

    async def connect() -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # the rest waits at the server
        sockets.append(connection)
        await loop.sock_connect(connection, ("127.0.0.1", port))
        return connection

    async def drip(connection: socket.socket, content: bytes) -> None:
        with contextlib.suppress(OSError):
            for byte in content:
                await loop.sock_sendall(connection, bytes([byte]))
                await asyncio.sleep(_PAUSE)

    async def sip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for _ in range(2**20):
                if not await loop.sock_recv(connection, 1):
                    return
                await asyncio.sleep(_PAUSE)

    body = {"prompt": [5, 6, 7], "max_tokens": _SLOW_TOKENS, "ignore_eos": True, "stream": True}
    content = json.dumps(body).encode()
    head, readers = request_head(COMPLETIONS, len(content)), list[socket.socket]()
    try:
        for _ in range(crowd.idle):
            await connect()
        for _ in range(crowd.half_open):
            tasks.append(asyncio.create_task(drip(await connect(), head)))
        for _ in range(crowd.slow_bodies):
            connection = await connect()
            await loop.sock_sendall(connection, head)
            tasks.append(asyncio.create_task(drip(connection, content)))
        for _ in range(crowd.slow_readers):
            readers.append(await connect())
            await loop.sock_sendall(readers[-1], head + content)
        await asyncio.sleep(0.5)
        await until_idle(port, seconds=300)  # with their tokens: from here on they are slow, and no more
        tasks += [asyncio.create_task(sip(connection)) for connection in readers]
        yield readers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in sockets:
            connection.close()


async def _use(port: int, seconds: float, rng: random.Random) -> tuple[float, list[Answer]]:
    """What a few ordinary users get: tokens a second, and the answers."""
    start, answers = time.monotonic(), list[Answer]()

    async def user() -> None:
        while time.monotonic() < start + seconds:
            prompt = [rng.randrange(3, 300) for _ in range(32)]
            body = {"prompt": prompt, "max_tokens": 32, "ignore_eos": True, "stream": True}
            answers.append(await post(port, body))

    await asyncio.gather(*(user() for _ in range(_NUM_USERS)))
    return 32 * len(answers) / (time.monotonic() - start), answers


async def _compare(
    endured: Endured, findings: Findings, seed: int, crowd: Crowd, rounds: int, seconds: float
) -> None:
    port, rng = endured.port, random.Random(f"{seed}/slow clients")
    await _use(port, seconds, rng)
    before = await endured.counts_at_rest()
    alone, beside, num_answers = list[float](), list[float](), 0
    are_complete = True
    for _ in range(rounds):  # in turn: a machine's speed changes over time
        rate, answers = await _use(port, seconds, rng)
        alone.append(rate)
        async with _gathered(port, crowd):
            rate, more = await _use(port, seconds, rng)
        beside.append(rate)
        are_complete &= all(answer.is_complete for answer in answers + more)
        num_answers += len(answers + more)
    after = await endured.counts_settled(before)
    slowdown = 1 - statistics.median(beside) / statistics.median(alone)
    findings.figures = {
        "crowd": {name: getattr(crowd, name) for name in crowd.__dataclass_fields__},
        "users": _NUM_USERS,
        "tokens/s alone": [round(rate, 1) for rate in alone],
        "tokens/s beside the crowd": [round(rate, 1) for rate in beside],
        "slowdown": round(slowdown, 4),
    }
    findings.promise("everybody else is answered", are_complete, f"{num_answers} requests")
    findings.promise(
        f"the others are slowed by at most {MOST_SLOWDOWN:.0%}",
        slowdown <= MOST_SLOWDOWN,
        f"{slowdown:+.1%}",
        takes_quiet=True,
    )
    findings.promise(
        "no task, thread or file is left of them",
        before == after,
        after if before == after else f"{before}, {after}",
    )


async def _read_late(endured: Endured, findings: Findings) -> None:
    """Who was slow gets all of the answer when he reads it at last."""
    loop = asyncio.get_running_loop()
    async with _gathered(endured.port, Crowd(idle=0, half_open=0, slow_bodies=0, slow_readers=3)) as readers:
        await asyncio.sleep(2 * _PAUSE)
        received = [bytearray() for _ in readers]

        async def read(connection: socket.socket, data: bytearray) -> None:
            while piece := await loop.sock_recv(connection, 2**16):
                data += piece

        await asyncio.gather(*map(read, readers, received))
    is_whole = [b"data: [DONE]" in data for data in received]
    findings.promise("a slow reader gets the whole answer in the end", all(is_whole), is_whole)


def run(*, seed: int, quick: bool) -> Findings:
    """Five rounds of 10 s alone and 10 s beside 1,200 slow clients; quick: one of 1 s, with fewer."""
    findings = Findings()
    crowd = Crowd(idle=100, half_open=10, slow_bodies=5, slow_readers=5) if quick else Crowd()
    with endured_server("--kv-cache-memory", "16MB", "--max-model-len", "1024") as endured:
        rounds, seconds = (1, 1.0) if quick else (5, 10.0)
        asyncio.run(_compare(endured, findings, seed, crowd, rounds, seconds))
        asyncio.run(_read_late(endured, findings))
    return findings
