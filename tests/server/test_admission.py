"""Who may wait, where they stand, how much a key may use, and how long a client waits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.config import ServerConfig
from minivllm.errors import InvalidRequestError, OverloadedError, RateLimitError
from minivllm.request import EngineEvent
from minivllm.server.admission import WaitingRoom
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.server.deadline import Deadline
from minivllm.server.keys import ApiKeys
from minivllm.server.rate_limit import TokenRateLimit
from tests.conftest import until

from .fakes import MODEL, FakeEngine, make_tokenizer

WAITS = {"prompt": "[wait]", "max_tokens": 3}


class GatedEngine(FakeEngine):
    """Begins with a request only when the gate is open."""

    def __init__(self) -> None:
        super().__init__(make_tokenizer())
        self.gate = asyncio.Event()
        self.num_arrived = 0

    async def generate(self, *args: Any) -> AsyncIterator[Any]:
        self.num_arrived += 1
        await self.gate.wait()
        async for event in super().generate(*args):
            yield event


class LongPromptEngine(FakeEngine):
    """Begins with ``[wait]``, and never comes to its first token."""

    def __init__(self) -> None:
        super().__init__(make_tokenizer())
        self.has_begun = asyncio.Event()
        """Set when the server has taken in that it was begun."""

    async def generate(self, request_id: str, prompt_token_ids: list[int], *args: Any) -> AsyncIterator[Any]:
        if bytes(prompt_token_ids) == b"[wait]":
            yield EngineEvent(request_id, [])
            self.has_begun.set()
            await asyncio.Event().wait()
        async for event in super().generate(request_id, prompt_token_ids, *args):
            yield event


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def serving(
    engine: FakeEngine, config: ServerConfig, keys: ApiKeys | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine, make_tokenizer(), config, MODEL, ServerState(), keys)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def until_waiting(client: httpx.AsyncClient, id: str, **options: Any) -> dict[str, Any]:
    for _ in range(2000):
        answer = await client.get(f"/v1/queue/{quote(id, safe='')}", **options)
        if answer.status_code == 200:
            return answer.json()
        await asyncio.sleep(0.005)
    pytest.fail("it never waited")


@pytest.mark.parametrize("stream", [False, True])
def test_no_more_than_so_many_wait(stream: bool) -> None:
    async def run() -> None:
        engine = GatedEngine()
        async with serving(engine, ServerConfig(max_waiting_requests=3)) as client:
            burst = [client.post("/v1/completions", json={**WAITS, "stream": stream}) for _ in range(10)]
            tasks = [asyncio.create_task(request) for request in burst]
            await until(lambda: engine.num_arrived + sum(task.done() for task in tasks) == 10)
            waiting = [task for task in tasks if not task.done()]
            assert len(waiting) == 3
            for task in set(tasks) - set(waiting):
                refused = task.result()
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "overloaded"
                assert "--max-waiting-requests" in refused.json()["error"]["message"]
                assert int(refused.headers["Retry-After"]) >= 1
            engine.gate.set()
            for task in waiting:
                assert (await task).status_code == 200
            assert (await client.post("/v1/completions", json=WAITS)).status_code == 200

    asyncio.run(run())


def test_prompts_of_so_many_tokens_wait() -> None:
    async def run() -> None:
        engine = GatedEngine()
        async with serving(engine, ServerConfig(max_waiting_tokens=50)) as client:
            body = {"prompt": [5] * 60, "max_tokens": 3}
            # Alone it may wait though it is over the limit: otherwise it never could.
            first = asyncio.create_task(
                client.post("/v1/completions", json=body, headers={"X-Request-Id": "first"})
            )
            await until(lambda: engine.num_arrived > 0)
            while (refused := await client.post("/v1/completions", json=WAITS)).status_code != 503:
                pytest.fail("it was let in")
            assert "--max-waiting-tokens" in refused.json()["error"]["message"]
            engine.gate.set()
            assert (await first).status_code == 200
            assert (await client.post("/v1/completions", json=body)).status_code == 200

    asyncio.run(run())


def test_places_in_the_queue() -> None:
    async def run() -> None:
        engine = GatedEngine()
        keys = ApiKeys(["one", "two"])
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        async with serving(engine, ServerConfig(), keys) as client:
            tasks = []
            for name, priority in (("a", 0), ("b", 0), ("trace/17:c?", -1)):
                body, headers = {**WAITS, "priority": priority}, {**one, "X-Request-Id": name}
                tasks.append(asyncio.create_task(client.post("/v1/completions", json=body, headers=headers)))
                await until_waiting(client, name, headers=one)
            for name, position in (("trace/17:c?", 1), ("a", 2), ("b", 3)):
                place = (await client.get(f"/v1/queue/{quote(name, safe='')}", headers=one)).json()
                assert place == {
                    "id": name,
                    "status": "waiting",
                    "position": position,
                    "num_waiting": 3,
                    "estimated_start_seconds": None,
                }
            assert (await client.get("/v1/queue/a", headers=two)).status_code == 404, "another key's"
            engine.gate.set()
            assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}
            gone = await client.get("/v1/queue/a", headers=one)
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "request_not_found")

    asyncio.run(run())


def test_a_prompt_that_was_begun_waits_no_more() -> None:
    """However long it takes to its first token."""

    async def run() -> None:
        engine = LongPromptEngine()
        async with serving(engine, ServerConfig(max_waiting_requests=1)) as client:
            task = asyncio.create_task(
                client.post("/v1/completions", json=WAITS, headers={"X-Request-Id": "long"})
            )
            await asyncio.wait_for(engine.has_begun.wait(), 10)
            place = (await client.get("/v1/queue/long")).json()
            assert (place["status"], place["position"], place["num_waiting"]) == ("running", 0, 0)
            assert (await client.post("/v1/completions", json={"prompt": "short"})).status_code == 200
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_an_aborted_or_refused_request_leaves_no_trace() -> None:
    async def run() -> None:
        engine = GatedEngine()
        async with serving(engine, ServerConfig(max_waiting_requests=1)) as client:
            for _ in range(3):
                task = asyncio.create_task(
                    client.post("/v1/completions", json=WAITS, headers={"X-Request-Id": "x"})
                )
                await until_waiting(client, "x")
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert (await client.post("/v1/completions", json={"prompt": 5})).status_code == 400
            engine.gate.set()
            assert (await client.post("/v1/completions", json=WAITS)).status_code == 200

    asyncio.run(run())


def test_estimates_follow_the_queue() -> None:
    clock = Clock()
    room = WaitingRoom(max_requests=10, clock=clock)
    assert room.seconds_until_start(1) is None
    tickets = [room.enter() for _ in range(10)]
    for ticket in tickets:
        clock.now += 2.0
        ticket.start()
        room.leave(ticket)
    estimate = room.seconds_until_start(5)
    assert estimate is not None
    assert math.isclose(estimate, 10.0)
    clock.now += 20
    assert room.seconds_until_start(5) == estimate, "nobody waited"
    for _ in range(10):
        room.enter()
    with pytest.raises(OverloadedError) as error:
        room.enter()
    assert error.value.retry_after == 2
    assert room.num_refused == 1
    clock.now += 1000
    assert room.seconds_until_start(1) is None


def test_only_time_with_somebody_waiting_counts() -> None:
    clock = Clock()
    room = WaitingRoom(clock=clock)
    for arrival, start in ((100.0, 102.0), (130.0, 131.0)):
        clock.now = arrival
        ticket = room.enter()
        clock.now = start
        ticket.start()
    assert room.seconds_until_start(1) == (2.0 + 1.0) / 2


def test_nobody_is_sent_away_for_more_than_a_minute() -> None:
    clock = Clock()
    room = WaitingRoom(max_requests=2, clock=clock)
    first, _ = room.enter(), room.enter()
    clock.now += 300.0
    first.start()
    assert room.seconds_until_start(1) == 300.0
    room.enter()
    with pytest.raises(OverloadedError, match="try again in 60 s") as error:
        room.enter()
    assert error.value.retry_after == 60


def test_who_can_t_be_begun_in_time_is_refused() -> None:
    clock = Clock()
    room = WaitingRoom(clock=clock)
    tickets = [room.enter() for _ in range(4)]
    tickets[-1].check_deadline(0.001)  # nobody knows yet
    for ticket in tickets[:2]:
        clock.now += 3.0
        ticket.start()
    third, fourth = tickets[2:]
    third.check_deadline(0.001)  # it is the next one
    fourth.check_deadline(3.1)
    fourth.check_deadline(None)
    stranger = room.enter()
    stranger.owner = "another key"
    stranger.check_deadline(0.001)  # with --fairness it may be the next one
    with pytest.raises(
        OverloadedError, match=r"1 of your requests are in front, .* 3\.0 s, .* waits 2\.9 s"
    ) as error:
        fourth.check_deadline(2.9)
    assert error.value.retry_after == 3
    assert room.num_refused == 1


def test_a_request_that_would_be_late_is_not_begun() -> None:
    async def run() -> None:
        engine = GatedEngine()
        async with serving(engine, ServerConfig()) as client:
            first = asyncio.create_task(
                client.post("/v1/completions", json=WAITS, headers={"X-Request-Id": "first"})
            )
            await until_waiting(client, "first")
            await asyncio.sleep(1.0)  # so much, at least, does a start take here
            engine.gate.set()
            assert (await first).status_code == 200
            engine.gate.clear()
            others = [
                asyncio.create_task(
                    client.post("/v1/completions", json=WAITS, headers={"X-Request-Id": str(number)})
                )
                for number in range(3)
            ]
            for number in range(3):
                await until_waiting(client, str(number))
            late = await client.post("/v1/completions", json={**WAITS, "timeout": 2.5})
            assert late.status_code == 503
            assert "3 of your requests are in front" in late.json()["error"]["message"]
            assert int(late.headers["Retry-After"]) >= 1
            engine.gate.set()
            assert {answer.status_code for answer in await asyncio.gather(*others)} == {200}

    asyncio.run(run())


def test_a_key_s_tokens_in_a_minute() -> None:
    async def run() -> None:
        keys = ApiKeys(["one", "two"])
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        body = {"prompt": "abcdefghij", "max_tokens": 40}
        async with serving(
            FakeEngine(make_tokenizer()), ServerConfig(key_tokens_per_minute=60), keys
        ) as client:
            first = await client.post("/v1/completions", json=body, headers=one)
            assert first.status_code == 200
            used = first.json()["usage"]["total_tokens"]
            assert used < 50, "it must give some back"
            refused = await client.post("/v1/completions", json=body, headers=one)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert f"{60 - used} are left" in refused.json()["error"]["message"]
            assert 0 < int(refused.headers["Retry-After"]) <= 60
            assert (await client.post("/v1/completions", json=body, headers=two)).status_code == 200

    asyncio.run(run())


def test_every_sample_may_use_its_tokens() -> None:
    """Of 60 tokens, 10 of a prompt and thrice 20 leave none."""

    async def run() -> None:
        engine = GatedEngine()
        async with serving(engine, ServerConfig(key_tokens_per_minute=60)) as client:
            body = {"prompt": "abcdefghij", "max_tokens": 20, "n": 3}
            first = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: engine.num_arrived > 0)
            # So many that a slow machine doesn't let them flow in meanwhile.
            second = client.post("/v1/completions", json={"prompt": "abcdefghij", "max_tokens": 20})
            assert (await asyncio.wait_for(second, 10)).status_code == 429
            engine.gate.set()
            assert (await first).status_code == 200

    asyncio.run(run())


def test_what_was_used_beyond_what_was_taken_is_owed() -> None:
    """A request may use more than a full bucket, and those after it wait for that."""
    clock = Clock()
    limit = TokenRateLimit(100, clock)
    assert limit.take("k", 1000) == 100
    limit.give_back("k", 100 - 300)
    with pytest.raises(RateLimitError) as error:
        limit.take("k", 1)
    assert error.value.retry_after == 121, "201 tokens, at 100 a minute"
    clock.now += 120.5
    with pytest.raises(RateLimitError):
        limit.take("k", 1)
    clock.now += 0.5
    assert limit.take("k", 1) == 1


def test_who_used_more_than_a_minute_s_tokens_waits_longer() -> None:
    async def run() -> None:
        async with serving(FakeEngine(make_tokenizer()), ServerConfig(key_tokens_per_minute=5)) as client:
            body = {"prompt": "abcdefghij", "max_tokens": 10}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            refused = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4})
            assert refused.status_code == 429
            # 15 over the 5 that it took, and 5 of its own: four minutes, of which some seconds have passed.
            assert int(refused.headers["Retry-After"]) > 60

    asyncio.run(run())


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 250), st.floats(0, 1)), max_size=40))
def test_a_bucket_against_a_ledger(requests: list[tuple[float, int, float]]) -> None:
    """Over any stretch of time no more is used than a full bucket and what flowed in since."""
    clock = Clock()
    limit = TokenRateLimit(100, clock)
    ledger: list[tuple[float, float]] = []
    for pause, num_tokens, used_share in requests:
        clock.now += pause
        try:
            taken = limit.take("k", num_tokens)
        except RateLimitError as error:
            clock.now += error.retry_after or 0
            taken = limit.take("k", num_tokens)
        used = int(taken * used_share)
        limit.give_back("k", taken - used)
        ledger.append((clock.now, used))
        for start in range(len(ledger)):
            total = sum(tokens for _, tokens in ledger[start:])
            assert total <= 100 + (clock.now - ledger[start][0]) * 100 / 60 + 1e-6


@pytest.mark.parametrize(
    ("field", "header", "expected"),
    [(None, None, None), (5.0, None, 5.0), (None, "2.5", 2.5), (5.0, "2.5", 2.5), (1.0, "2.5", 1.0)],
)
def test_the_shorter_of_two_timeouts(field: float | None, header: str | None, expected: float | None) -> None:
    left = Deadline.of(field, {} if header is None else {"X-Request-Timeout": header}).seconds_left()
    if expected is None:
        assert left is None
    else:
        assert left is not None
        assert expected - 1 < left <= expected


@pytest.mark.parametrize("header", ["", "0", "-1", "x", "1e3", "nan", "inf", "86401", "9" * 400, "1 "])
def test_a_timeout_that_is_none(header: str) -> None:
    with pytest.raises(InvalidRequestError, match="X-Request-Timeout"):
        Deadline.of(None, {"X-Request-Timeout": header})


def test_timeouts_and_keys_reach_the_engine() -> None:
    async def run() -> None:
        engine = FakeEngine(make_tokenizer())
        headers = {"Authorization": "Bearer two", "X-Request-Timeout": "30"}
        async with serving(engine, ServerConfig(), ApiKeys(["one", "two"])) as client:
            body = {"prompt": "a", "timeout": 600, "priority": 3}
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
        (terms,) = engine.terms.values()
        assert (terms.priority, terms.tenant) == (3, "key-2")
        assert terms.timeout is not None
        assert 20 < terms.timeout <= 30

    asyncio.run(run())
