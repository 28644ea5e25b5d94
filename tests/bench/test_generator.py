"""Who sends when: in virtual time, where every time is exact, with a server that is a function."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.errors import MinivllmError
from minivllm_bench.generator import FAILURES_IN_A_ROW, LoadGenerator, ServerFailedError
from minivllm_bench.load import Load, arrival_times
from minivllm_bench.prompts import Conversation
from minivllm_bench.records import RequestRecord
from minivllm_bench.workloads import WORKLOADS, Workload, agent, fixed, growing_chat

from .virtual_time import VirtualLoop, run


@dataclass
class Server:
    """Answers after so many seconds; the n-th request fails if ``fails`` says so."""

    seconds: Callable[[int], float] = lambda n: 1.0
    fails: Callable[[int], bool] = lambda n: False
    raises: Callable[[int], bool] = lambda n: False
    prompts: list[str] = field(default_factory=list)
    called: list[float] = field(default_factory=list)
    num_under_way: int = 0
    most_under_way: int = 0

    async def ask(
        self, conversation: Conversation, num_tokens: int, record: RequestRecord, clock: Callable[[], float]
    ) -> str:
        number = len(self.prompts)
        self.prompts.append(conversation.prompt)
        self.called.append(clock())
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        try:
            await asyncio.sleep(self.seconds(number))
        finally:
            self.num_under_way -= 1
        if self.raises(number):
            raise MinivllmError("it has gone")
        record.finished = clock()
        record.output_tokens = num_tokens
        if self.fails(number):
            record.error = "no"
        return f" answer {number}"


def generate(server: Server, load: Load, workload: Workload = WORKLOADS["fixed"]) -> LoadGenerator:
    generator = LoadGenerator(server.ask, workload, load)
    run(generator.run())
    assert server.num_under_way == 0
    return generator


@given(st.integers(1, 8), st.integers(1, 40), st.lists(st.integers(1, 50), min_size=1))
def test_users_send_when_their_last_request_has_ended(users: int, count: int, times: list[int]) -> None:
    server = Server(seconds=lambda n: times[n % len(times)])
    generator = generate(server, Load(users=users, num_requests=count))
    records = generator.records
    assert len(records) == count
    assert server.most_under_way == min(users, count)
    ends = sorted(record.finished or 0 for record in records)
    assert [record.sent for record in records[:users]] == [0] * min(users, count)
    assert [record.sent for record in records[users:]] == pytest.approx(ends[: max(0, count - users)])
    assert generator.seconds == pytest.approx(ends[-1])
    assert [record.sent for record in records] == pytest.approx(server.called)


def test_a_duration_ends_the_sending_and_a_drain_the_waiting() -> None:
    """Requests of 4 s from one user: sent at 0, 4 and 8; the last one would end at 12."""
    for drain, is_finished in ((0.0, False), (1.9, False), (2.1, True)):
        load = Load(users=1, duration=10, drain=drain)
        generator = generate(Server(seconds=lambda n: 4.0), load)
        assert [record.sent for record in generator.records] == pytest.approx([0, 4, 8])
        ends = [record.finished for record in generator.records]
        assert ends == pytest.approx([4, 8, 12 if is_finished else None])
        assert generator.seconds == 10
        assert [record.error for record in generator.records] == [None] * 3


def test_a_run_that_is_complete_before_its_duration() -> None:
    generator = generate(Server(), Load(users=2, duration=10, num_requests=4))
    assert generator.seconds == pytest.approx(2)


@given(st.floats(0.1, 10), st.floats(0.2, 5), st.integers(0, 5), st.floats(0, 20))
@settings(max_examples=30)
def test_an_open_loop_does_not_wait(rate: float, burstiness: float, seed: int, time: float) -> None:
    load = Load(rate=rate, burstiness=burstiness, num_requests=30, seed=seed)
    server = Server(seconds=lambda n: time)
    records = generate(server, load).records
    arrivals = list(itertools.islice(arrival_times(rate, burstiness, random.Random(f"{seed}/arrivals")), 30))
    assert [record.sent for record in records] == arrivals
    assert server.called == pytest.approx(arrivals, abs=1e-6)
    assert [record.finished for record in records] == pytest.approx([at + time for at in arrivals], abs=1e-6)


def test_an_open_loop_ends_with_its_duration() -> None:
    generator = generate(Server(seconds=lambda n: 5.0), Load(rate=10.0, duration=20, drain=0))
    arrivals = arrival_times(10.0, 1.0, random.Random("0/arrivals"))
    assert [r.sent for r in generator.records] == list(itertools.takewhile(lambda at: at < 20, arrivals))
    for record in generator.records:
        assert (record.finished is None) == (record.sent + 5 > 20)
    assert generator.seconds == 20


def test_requests_that_were_late_count_from_when_they_should_have_been_sent() -> None:
    """The first request holds up the whole process for 3 s."""

    def seconds(number: int) -> float:
        if number == 0:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.stall(3)
        return 1.0

    server = Server(seconds=seconds)
    records = generate(server, Load(rate=5.0, num_requests=10)).records
    arrivals = list(itertools.islice(arrival_times(5.0, 1.0, random.Random("0/arrivals")), 10))
    assert [record.sent for record in records] == arrivals
    assert max(late - at for late, at in zip(server.called, arrivals, strict=True)) > 2


@pytest.mark.parametrize("load", [Load(users=3, num_requests=60), Load(rate=2.0, num_requests=60)])
@pytest.mark.parametrize("workload", [growing_chat(), agent(5)])
def test_turns_follow_each_other(load: Load, workload: Workload) -> None:
    server = Server(seconds=lambda n: 1 + n % 3)
    records = generate(server, load, workload).records
    assert len(records) == 60
    sessions: dict[int, list[int]] = {}
    for place, record in enumerate(records):
        sessions.setdefault(record.session, []).append(place)
    assert list(sessions) == list(range(len(sessions)))
    assert any(len(places) > 2 for places in sessions.values())
    for places in sessions.values():
        assert [records[place].turn for place in places] == list(range(len(places)))
        for one, other in itertools.pairwise(places):
            assert records[other].sent == records[one].finished
            assert server.prompts[other].startswith(f"{server.prompts[one]} answer {one} ")
    first_words = [server.prompts[places[0]].split()[:300] for places in sessions.values()]
    assert len({tuple(words) for words in first_words}) == len(sessions)


def test_a_failed_turn_ends_its_session() -> None:
    server = Server(fails=lambda n: n % 4 == 2)
    records = generate(server, Load(users=1, num_requests=10), agent(3)).records
    turns = [(record.session, record.turn) for record in records]
    # Requests 2 and 6 fail: the last turn of session 0, and the first of session 2.
    assert turns == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1), (3, 2)]


def test_too_many_failures_in_a_row_end_the_run() -> None:
    server = Server(fails=lambda n: n >= 5)
    generator = LoadGenerator(server.ask, WORKLOADS["fixed"], Load(users=2, num_requests=1000))
    with pytest.raises(ServerFailedError, match=f"the last {FAILURES_IN_A_ROW} requests failed: no"):
        run(generator.run())
    assert 5 + FAILURES_IN_A_ROW <= len(generator.records) <= 5 + FAILURES_IN_A_ROW + 2
    assert sum(record.is_complete for record in generator.records) == 5
    assert generator.seconds > 0


def test_one_success_in_between_is_enough() -> None:
    server = Server(fails=lambda n: n % FAILURES_IN_A_ROW != 0)
    assert len(generate(server, Load(users=1, num_requests=200)).records) == 200


def test_a_server_that_has_gone_ends_the_run() -> None:
    """Of four users, two find out at the same moment; the others are broken off."""
    server = Server(seconds=lambda n: 1.0 if n < 6 else 2.0 if n < 8 else 9.0, raises=lambda n: n in (6, 7))
    generator = LoadGenerator(server.ask, WORKLOADS["fixed"], Load(users=4, num_requests=1000))
    with pytest.raises(MinivllmError, match="it has gone"):
        run(generator.run())
    assert server.num_under_way == 0
    assert sum(record.is_complete for record in generator.records) == 6
    assert generator.seconds == pytest.approx(3)


def test_a_run_that_is_cancelled_keeps_what_it_has() -> None:
    server = Server(seconds=lambda n: 2.0)
    generator = LoadGenerator(server.ask, fixed(5, 5), Load(users=2, num_requests=1000))

    async def work() -> None:
        task = asyncio.create_task(generator.run())
        await asyncio.sleep(5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(work())
    assert server.num_under_way == 0
    assert [record.finished for record in generator.records] == pytest.approx([2, 2, 4, 4, None, None])
    assert generator.seconds == pytest.approx(5)
