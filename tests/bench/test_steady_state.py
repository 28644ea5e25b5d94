"""The figures of a window, from records and from a server whose every token has a known time."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm_bench.generator import Clock
from minivllm_bench.points import measure_agents, measure_point
from minivllm_bench.prompts import Conversation
from minivllm_bench.records import RequestRecord
from minivllm_bench.results import Point
from minivllm_bench.steady_state import steady_state, wait_percentile
from minivllm_bench.workloads import WORKLOADS, fixed
from tests.bench.virtual_time import run

times = st.lists(st.floats(0.01, 100), max_size=30)


def record(
    sent: float, *tokens: float, finished: float | None = None, error: str | None = None
) -> RequestRecord:
    result = RequestRecord(0, 0, sent, 10, chunk_times=list(tokens), finished=finished, error=error)
    result.output_tokens = len(tokens) if finished is not None else 0
    return result


@given(times.filter(bool), st.integers(1, 100))
def test_without_censoring_a_percentile_is_the_nearest_rank(observed: list[float], percent: int) -> None:
    rank = max(1, math.ceil(len(observed) * percent / 100 - 1e-9))
    assert wait_percentile(observed, [], percent) == sorted(observed)[rank - 1]


def test_a_known_product_limit_estimate() -> None:
    """Ends at 6 (3 of 21), 7 (1 of 17), 10 (1 of 15), 13, 16, 22, 23: the data of Freireich et al. (1963)."""
    observed = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    waiting = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    assert wait_percentile(observed, waiting, 50) == 23  # published: S(23) = 0.448, S(22) = 0.538
    assert wait_percentile(observed, waiting, 46) == 22
    assert wait_percentile(observed, waiting, 55) == 23
    assert wait_percentile(observed, waiting, 56) is None


@given(times, times, st.integers(1, 99))
def test_waiting_longer_never_makes_a_wait_shorter(
    observed: list[float], waiting: list[float], percent: int
) -> None:
    shorter = wait_percentile(observed, waiting, percent)
    longer = wait_percentile(observed, [seconds + 50 for seconds in waiting], percent)
    if shorter is None:
        assert longer is None
    else:
        assert longer is None or longer >= shorter


def test_the_estimate_is_right_where_leaving_out_is_wrong() -> None:
    """Exponential waits with mean 10 s, looked at for up to 12 s each: their median is 6.93 s."""
    rng = random.Random(1)
    observed, waiting = [], []
    for _ in range(20_000):
        wait, looked = rng.expovariate(0.1), rng.uniform(0, 12)
        (observed if wait <= looked else waiting).append(min(wait, looked))
    assert wait_percentile(observed, waiting, 50) == pytest.approx(10 * math.log(2), rel=0.05)
    assert sorted(observed)[len(observed) // 2] < 4
    assert wait_percentile(observed, waiting, 90) is None


def test_a_window_counts_what_arrives_in_it() -> None:
    records = [
        record(0.0, 1.0, 2.0, 3.0, 4.0, finished=4.0),  # 3.0 and 4.0 are in the window
        record(4.0, 5.0, 8.0),  # 5.0 is, 8.0 comes after it
        record(2.5),  # waits for 3.5 s
        record(5.0, error="HTTP 500", finished=5.5),
    ]
    figures = steady_state(records, 2, 2.0, 6.0)
    assert figures["output_throughput"] == 3 / 4
    assert figures["user_throughput"] == 3 / 8
    assert figures["failed"] == 1
    assert figures["errors"] == {"HTTP 500": 1}
    assert figures["ttft"]["observed"] == 1
    assert figures["ttft"]["waiting"] == 1
    assert figures["ttft"]["p50"] == 1.0
    assert figures["ttft"]["p99"] is None
    assert figures["ttft"]["longest"] == 3.5
    assert figures["itl"]["mean"] == 1.0


def test_who_has_waited_since_before_the_window_counts_with_all_of_it() -> None:
    figures = steady_state([record(0.0, 0.5), record(0.0, 7.0), record(0.0)], 3, 2.0, 10.0)
    assert figures["ttft"] == {
        "p50": 7.0, "p90": None, "p99": None, "longest": 10.0, "observed": 1, "waiting": 1,
    }  # fmt: skip


def test_without_a_new_request_in_the_window_the_first_ones_count() -> None:
    figures = steady_state([record(0.0, 0.5, 1.5, 2.5)], 1, 1.0, 3.0)
    assert figures["ttft"]["p50"] == 0.5


class Slots:
    """A server with so many slots, a queue before them, and seconds for each token of a running request.

    A prompt takes seconds, too, in which no other prompt is read.
    """

    def __init__(self, slots: int, seconds_per_token: float = 1.0, seconds_per_prompt: float = 0.0) -> None:
        self._free = asyncio.Semaphore(slots)
        self._reads = asyncio.Lock()
        self._seconds_per_token = seconds_per_token
        self._seconds_per_prompt = seconds_per_prompt
        self.lengths: list[int] = []

    async def ask(self, conversation: Conversation, tokens: int, record: RequestRecord, clock: Clock) -> str:
        self.lengths.append(record.prompt_tokens)
        async with self._free:
            async with self._reads:
                await asyncio.sleep(self._seconds_per_prompt)
            for _ in range(tokens):
                await asyncio.sleep(self._seconds_per_token)
                record.chunk_times.append(clock())
        record.output_tokens = tokens
        record.finished = clock()
        return " word" * tokens


async def silent() -> None:
    """The health of a server that doesn't say."""


def measured(slots: int, users: int, seconds: float) -> Point:
    async def measure() -> Point:
        server = Slots(slots)
        return await measure_point(
            server.ask, silent, WORKLOADS["memoryless"], users=users, warm_up=9.0, seconds=seconds, seed=1
        )

    return run(measure())


@pytest.mark.parametrize(("slots", "users"), [(8, 1), (8, 8), (1, 4), (4, 16)])
def test_a_point_measures_the_steady_state(slots: int, users: int) -> None:
    """As many tokens a second as there are busy slots, though those that queue wait longer than the run."""
    figures = measured(slots, users, 400.0)["figures"]
    assert figures is not None
    assert figures["output_throughput"] == pytest.approx(min(slots, users), rel=0.01)
    start, end = figures["window"]
    assert end - start == pytest.approx(400.0, abs=0.1)
    if users <= slots:
        assert start == pytest.approx(1.0, abs=0.1)
        assert figures["ttft"]["p99"] == pytest.approx(1.0)
    else:
        assert start == pytest.approx(9.0, abs=0.1)
        assert figures["ttft"]["waiting"] > 0
        assert figures["ttft"]["p99"] is None


@pytest.mark.parametrize(
    ("slots", "users", "seconds_per_token", "opens"),
    [
        (64, 50, 0.1, 10.1),  # nobody queues: each user has a first token when all prompts have been read
        (1, 50, 0.01, 2.0),  # they queue: one answer is done, and at most one under way
        (64, 128, 10.0, 30.6),  # half of them have begun, and nobody is done: as long as it may take
    ],
)
def test_a_window_opens_when_a_server_is_in_its_stride(
    slots: int, users: int, seconds_per_token: float, opens: float
) -> None:
    async def measure() -> Point:
        server = Slots(slots, seconds_per_token, seconds_per_prompt=0.2)
        return await measure_point(
            server.ask, silent, fixed(10, 180), users=users, warm_up=30.6, seconds=1.0, seed=1
        )

    figures = run(measure())["figures"]
    assert figures is not None
    assert figures["window"][0] == pytest.approx(opens, abs=0.1)


def test_health_is_looked_at_during_the_window() -> None:
    looks: list[float] = []

    async def health() -> dict[str, Any]:
        looks.append(asyncio.get_running_loop().time())
        running = len(looks) % 2
        return {"num_running": running, "num_waiting": 1 - running, "kv_cache_usage": len(looks) / 100}

    async def measure() -> Point:
        return await measure_point(
            Slots(2).ask, health, fixed(10, 5), users=2, warm_up=5.0, seconds=2.9, seed=0
        )

    point = run(measure())
    assert point["figures"] is not None
    start, end = point["figures"]["window"]
    assert looks == pytest.approx([start + 0.5 * number for number in range(6)], abs=0.01)
    assert looks[-1] < end
    assert point["occupancy"] == {
        "running_mean": 0.5, "running_max": 1, "waiting_mean": 0.5, "waiting_max": 1,
        "kv_usage_mean": pytest.approx(0.035), "kv_usage_max": 0.06,
    }  # fmt: skip


@pytest.mark.parametrize("users", [1, 3])
def test_agents_are_timed_from_first_step_to_last(users: int) -> None:
    async def measure() -> tuple[list[float | None], list[int], list[int]]:
        server = Slots(users)
        result = await measure_agents(server.ask, users=users, steps=5, limit=1000.0, seed=3)
        return result["seconds"], result["steps_done"], server.lengths

    seconds, done, lengths = run(measure())
    assert seconds == [pytest.approx(5 * 32.0)] * users
    assert done == [5] * users
    assert lengths[: 5 * users : users] == sorted(lengths[: 5 * users : users])  # each step sends all so far


def test_agents_that_are_done_or_have_failed_leave() -> None:
    """One agent is slow and one fails: neither is kept company by a third that begins again."""
    sent: list[int] = []

    async def ask(conversation: Conversation, tokens: int, record: RequestRecord, clock: Clock) -> str:
        sent.append(record.session)
        await asyncio.sleep(50.0 if record.session == 2 else 1.0)
        record.finished, record.output_tokens = clock(), tokens
        if record.session == 3 and record.turn == 1:
            record.error = "no"
        return " word" * tokens

    async def measure() -> tuple[list[float | None], list[int], str | None]:
        result = await measure_agents(ask, users=4, steps=5, limit=1000.0, seed=0)
        return result["seconds"], result["steps_done"], result["failed"]

    seconds, done, failed = run(measure())
    assert seconds == [pytest.approx(5.0), pytest.approx(5.0), pytest.approx(250.0), None]
    assert (done, failed) == ([5, 5, 5, 1], "no")
    assert sorted(sent) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 2


def test_agents_that_are_not_done_in_time_are_broken_off() -> None:
    async def measure() -> tuple[list[float | None], list[int], float | None]:
        result = await measure_agents(Slots(1).ask, users=2, steps=2, limit=100.0, seed=0)
        return result["seconds"], result["steps_done"], result["limit"]

    seconds, done, limit = run(measure())
    assert seconds == [pytest.approx(96.0), None]
    assert done == [2, 1]
    assert limit == 100.0
