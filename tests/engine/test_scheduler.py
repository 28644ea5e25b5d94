"""The engine's step loop over a fake runner: no weights, but a KV cache whose contents are checked.

The fake model's next token is a hash of the tokens that it reads from the cache through the block
table. A request's answer is therefore known in advance, and comes out wrong whenever a slot holds
anything but the request's own prefix. Every test runs both block managers under both schedulers.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.runner import PendingTokens
from minivllm.engine.scheduler import SampledToken, ScheduledBatch
from minivllm.errors import InvalidRequestError
from minivllm.request import (
    PENDING_TOKEN,
    EngineEvent,
    EngineInfo,
    FinishReason,
    Request,
    SamplingParams,
)

S = 16  # slots in a block
VOCAB_SIZE = 10
EOS = frozenset({0, 1})
STOP_ID = 2
POLICIES = [
    (allocation, scheduler)
    for allocation in ("paged", "contiguous")
    for scheduler in ("continuous", "sequential")
]


def next_token(tokens: list[int]) -> int:
    """The fake model: every token depends on all before it, and about every sixth ends the turn."""
    state = 7
    for token in tokens:
        state = (state * 1_000_003 + token + 1) % 2**61
    pick = (state >> 20) % 60
    return pick % 2 if pick < 10 else 2 + pick % (VOCAB_SIZE - 2)


def expected_answer(
    prompt: list[int], params: SamplingParams, max_model_len: int
) -> tuple[list[int], FinishReason]:
    """What a request must give, whatever else runs."""
    limit = max_model_len
    if params.max_tokens is not None:
        limit = min(limit, len(prompt) + params.max_tokens)
    answer: list[int] = []
    while True:
        token = next_token(prompt + answer)
        answer.append(token)
        is_end = token in params.stop_token_ids or (token in EOS and not params.ignore_eos)
        if is_end and len(answer) > params.min_tokens:
            return answer, FinishReason.STOP
        if len(prompt) + len(answer) >= limit:
            return answer, FinishReason.LENGTH


class StepFailed(RuntimeError):
    pass


class FakeRunner:
    """Keeps in each slot the token that was written there and its position, as a real cache keeps its KV.

    A step in ``failing_steps`` raises, after it has overwritten what it was allowed to write. One that
    runs ahead knows the tokens it sampled, as a device does, before the engine has taken them in.
    """

    def __init__(self, failing_steps: frozenset[int] = frozenset(), *, runs_ahead: bool = False) -> None:
        self.failing_steps = failing_steps
        self.runs_ahead = runs_ahead
        self.last_sampled: dict[Request, int] = {}
        self.num_steps = 0
        self.slots: dict[int, tuple[int, int]] = {}
        self.last_batch: list[tuple[Request, int, int]] = []  # request, first position, tokens

    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        self.num_steps += 1
        items = [(item.request, item.start, item.num_tokens) for item in batch.requests]
        self.last_batch = items
        written: set[int] = set()
        for request, start, num_tokens in items:
            assert 0 < num_tokens <= len(request.token_ids) - start
            for position in range(start, start + num_tokens):
                slot = self.slot(request, position)
                assert slot not in written, "two tokens of one step in one slot"
                written.add(slot)
                self.slots[slot] = (self.token(request, position), position)
        if self.num_steps in self.failing_steps:
            for slot in written:
                self.slots[slot] = (-1, -1)
            raise StepFailed(f"step {self.num_steps}")
        sampled: list[SampledToken | None] = []
        for request, start, num_tokens in items:
            end = start + num_tokens
            self.check_contents(request, end)
            in_cache = [self.slots[self.slot(request, position)][0] for position in range(end)]
            is_last = end == len(request.token_ids)
            sampled.append(SampledToken(next_token(in_cache)) if is_last else None)
        self.last_sampled = {
            request: token.token_id
            for (request, _, _), token in zip(items, sampled, strict=True)
            if token is not None
        }
        return lambda: sampled

    def token(self, request: Request, position: int) -> int:
        token = request.token_ids[position]
        if token != PENDING_TOKEN:
            return token
        assert self.runs_ahead
        assert position == len(request.token_ids) - 1
        return self.last_sampled[request]

    @staticmethod
    def slot(request: Request, position: int) -> int:
        return request.block_table[position // S] * S + position % S

    def check_contents(self, request: Request, end: int) -> None:
        """The first ``end`` tokens' slots hold these tokens at these positions, and nothing else."""
        have = [self.slots.get(self.slot(request, position)) for position in range(end)]
        want = [(self.token(request, position), position) for position in range(end)]
        assert have == want, f"{request.request_id} reads keys and values that aren't its own"


@dataclass
class Job:
    """A request and when it comes, and perhaps when its client goes."""

    prompt: list[int]
    params: SamplingParams
    arrival_step: int = 0
    abort_step: int | None = None

    token_ids: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class Setup:
    allocation: str
    scheduler: str
    num_blocks: int
    max_model_len: int
    budget: int
    max_num_seqs: int = 256
    num_parallel: int = 1
    prefix_cache: bool | None = None

    def engine(self, runner: FakeRunner, **options: Any) -> Engine:
        config = EngineConfig(
            kv_allocation=self.allocation,
            scheduler=self.scheduler,
            max_num_seqs=self.max_num_seqs,
            num_parallel=self.num_parallel if self.scheduler == "sequential" else None,
            enable_prefix_caching=self.prefix_cache if self.allocation == "paged" else None,
            seed=0,
        )
        return Engine(
            config,
            runner,
            EngineInfo(self.max_model_len, VOCAB_SIZE),
            num_blocks=self.num_blocks,
            max_num_batched_tokens=self.budget,
            eos_token_ids=EOS,
            **options,
        )

    @property
    def most_running(self) -> int:
        most = min(self.max_num_seqs, self.budget)
        return min(most, self.num_parallel) if self.scheduler == "sequential" else most


class Driver:
    """Steps an engine through its jobs and checks, around every step, what must hold."""

    def __init__(
        self,
        setup: Setup,
        jobs: list[Job],
        failing_steps: frozenset[int] = frozenset(),
        *,
        runs_ahead: bool = False,
    ) -> None:
        self.setup, self.jobs = setup, jobs
        self.runner = FakeRunner(failing_steps, runs_ahead=runs_ahead)
        self.engine = setup.engine(self.runner)
        self.rank: dict[str, int] = {}  # order of arrival
        # Nobody is admitted past the oldest unfinished request, and nobody evicts it: while it is the
        # oldest, each step computes at least one of its tokens, or raises and ends it.
        self.most_steps = sum(len(job.prompt) + self.most_new_tokens(job) for job in jobs) + len(jobs)
        if runs_ahead:
            self.most_steps *= 2  # every token may have to wait for the one before it

    def most_new_tokens(self, job: Job) -> int:
        room = self.setup.max_model_len - len(job.prompt)
        return room if job.params.max_tokens is None else min(room, job.params.max_tokens)

    def run(self) -> Driver:
        now = num_busy_steps = 0
        while any(job.reason is None for job in self.jobs):
            for number, job in enumerate(self.jobs):
                if job.arrival_step == now:
                    self.add(number)
            for number, job in enumerate(self.jobs):
                if job.abort_step == now and job.arrival_step <= now:
                    self.abort(number)
            num_busy_steps += self.engine.has_work
            assert num_busy_steps <= self.most_steps, "requests hang"
            if self.runner.runs_ahead:
                self.step_ahead()
            else:
                self.step()
            now += 1
        if self.runner.runs_ahead and self.engine.has_work:
            self.step_ahead()  # the last request's end came to light while one more step was running
        assert not self.engine.has_work
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
        self.check_answers()
        return self

    def add(self, number: int) -> None:
        self.rank[str(number)] = len(self.rank)
        job = self.jobs[number]
        self.engine.add(str(number), list(job.prompt), job.params)
        self.engine.check_integrity()

    def abort(self, number: int) -> None:
        job = self.jobs[number]
        used_before = self.engine.stats().num_used_blocks
        aborted = self.engine.abort(str(number))
        self.engine.check_integrity()
        assert (aborted is None) == (job.reason is not None)
        if aborted is not None:
            self.record(aborted)
            assert job.reason is FinishReason.ABORT
            assert self.engine.stats().num_used_blocks <= used_before
        assert self.engine.abort(str(number)) is None  # a second time finds nothing

    def step(self) -> None:
        scheduler, manager = self.engine.scheduler, self.engine.block_manager
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        tokens = {request: list(request.token_ids) for request in [*running, *waiting]}
        computed = {request: request.num_computed_tokens for request in running}
        preemptions = {request: request.metrics.num_preemptions for request in [*running, *waiting]}
        num_needing_a_block = sum(
            request.num_uncomputed_tokens == 1 and request.num_computed_tokens == len(request.block_table) * S
            for request in running
        )
        num_free = manager.num_free_blocks
        num_steps, self.runner.last_batch = self.runner.num_steps, []
        now_running: list[Request] = []
        waits_for: list[str | None] = []
        schedule = scheduler.schedule

        def spy() -> ScheduledBatch:
            batch = schedule()
            now_running.extend(scheduler.running)
            waits_for.append(batch.waits_for)
            self.check_schedule(batch)
            return batch

        scheduler.schedule = spy  # type: ignore[method-assign]
        try:
            events = self.engine.step()
        finally:
            scheduler.schedule = schedule  # type: ignore[method-assign]
        self.engine.check_integrity()

        assert self.runner.num_steps == num_steps + bool(running or waiting), "a step did nothing"
        assert [self.engine.stats().waits_for] == waits_for
        # Evicted: the last ones of those that ran. Admitted: from the head of the queue, where the
        # evicted are now. (One may come back at once, if it finds its prefix in another's blocks.)
        evicted = [r for r in running if r.metrics.num_preemptions > preemptions[r]]
        kept = running[: len(running) - len(evicted)]
        assert kept + evicted == running
        assert all(r.metrics.num_preemptions == preemptions[r] + (r in evicted) for r in preemptions)
        assert now_running[: len(kept)] == kept
        admitted = now_running[len(kept) :]
        assert admitted == (evicted + waiting)[: len(admitted)]
        if evicted:
            assert num_needing_a_block > num_free, "evicted though there were blocks"
        for request, before in tokens.items():
            assert request.token_ids[: len(before)] == before
        # Decodes never wait, and no token of the budget is left over while somebody could use it.
        scheduled = {request: num_tokens for request, _, num_tokens in self.runner.last_batch}
        decodes = [request for request in kept if len(tokens[request]) - computed[request] == 1]
        assert all(scheduled.get(request) == 1 for request in decodes)
        if sum(scheduled.values()) < self.setup.budget:
            for request in kept:
                assert scheduled.get(request) == len(tokens[request]) - computed[request]
        for event_ in events:
            self.record(event_)

    def step_ahead(self) -> None:
        """A step that leaves another behind: what ran in it shows in the answers."""
        before = self.runner.num_steps
        events = self.engine.step()
        self.engine.check_integrity()
        assert events or self.runner.num_steps > before or not self.engine.has_work, "a step did nothing"
        for event_ in events:
            self.record(event_)

    def check_schedule(self, batch: ScheduledBatch) -> None:
        scheduler = self.engine.scheduler
        assert batch.num_tokens == sum(item.num_tokens for item in batch.requests) <= self.setup.budget
        requests = [item.request for item in batch.requests]
        assert len(set(requests)) == len(requests)
        assert set(requests) <= set(scheduler.running)
        assert len(scheduler.running) <= self.setup.most_running
        # Whoever still waits is told what for.
        if not scheduler.waiting:
            assert batch.waits_for is None
        elif len(scheduler.running) == self.setup.most_running:
            assert batch.waits_for in ("max_num_seqs", "num_parallel")
        elif batch.num_tokens == self.setup.budget:
            assert batch.waits_for == "max_num_batched_tokens"
        else:
            assert batch.waits_for == "blocks"
        # First come, first served, evictions included: nobody runs before an older one that waits.
        order = [self.rank[r.request_id] for r in [*scheduler.running, *scheduler.waiting]]
        assert order == sorted(order)

    def record(self, event_: EngineEvent) -> None:
        job = self.jobs[int(event_.request_id)]
        assert job.reason is None, "an event after the last one"
        job.token_ids += event_.new_token_ids
        job.reason, job.error = event_.finish_reason, event_.error
        brings_first_token = bool(event_.new_token_ids) and len(job.token_ids) == 1
        assert (event_.metrics is not None) == (brings_first_token or event_.finish_reason is not None)
        if event_.metrics is not None:
            metrics = event_.metrics
            assert metrics.arrival_time > 0
            if job.token_ids:
                times = (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time)
                assert list(times) == sorted(times)
            if event_.finish_reason is not None:
                assert metrics.finished_time >= max(metrics.arrival_time, metrics.first_token_time)

    def check_answers(self) -> None:
        for job in self.jobs:
            expected, reason = expected_answer(job.prompt, job.params, self.setup.max_model_len)
            if job.reason in (FinishReason.ABORT, FinishReason.ERROR):
                assert job.token_ids == expected[: len(job.token_ids)]
                assert len(job.token_ids) < len(expected)
                assert (job.error is not None) == (job.reason is FinishReason.ERROR)
            else:
                assert (job.token_ids, job.reason, job.error) == (expected, reason, None)


def make_job(seed: int, number: int, max_model_len: int, *, spread: int = 12) -> Job:
    """The ``number``-th job of a random load, the same however many there are."""
    rng = random.Random(f"{seed}/{number}")
    length = rng.randrange(1, max_model_len)
    # Half of the prompts are made of blocks of one token, so that prefixes are shared all the time.
    if rng.random() < 0.5:
        prompt = [token for _ in range(max_model_len) for token in [rng.choice([3, 3, 3, 4])] * S][:length]
    else:
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
    room = max_model_len - length
    max_tokens = rng.choice([None, room, rng.randrange(1, room + 1)])
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.randrange(min(5, room if max_tokens is None else max_tokens) + 1),
        ignore_eos=rng.random() < 0.85,
        stop_token_ids=rng.choice([(), (), (STOP_ID,)]),
    )
    arrival = rng.randrange(spread)
    abort = arrival + rng.randrange(40) if rng.random() < 1 / 8 else None
    return Job(prompt, params, arrival, abort)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    # Only paged and continuous preempts: have more of it.
    allocation, scheduler = draw(st.sampled_from(POLICIES + [("paged", "continuous")] * 2))
    max_model_len = draw(st.one_of(st.integers(2, 60), st.integers(60, 130)))
    smallest = -(-max_model_len // S)  # one sequence fits, barely
    return Setup(
        allocation,
        scheduler,
        num_blocks=smallest + draw(st.one_of(st.integers(0, 5), st.integers(0, 3 * smallest))),
        max_model_len=max_model_len,
        budget=draw(st.one_of(st.integers(1, 8), st.integers(8, 130))),
        max_num_seqs=draw(st.integers(1, 12)),
        num_parallel=draw(st.integers(1, 4)),
        prefix_cache=draw(st.sampled_from([True, True, False])),
    )


@settings(max_examples=300)
@given(
    setup=setups(),
    num_jobs=st.one_of(st.integers(1, 8), st.integers(8, 20)),
    seed=st.integers(0, 2**32),
    failing_steps=st.one_of(st.just(frozenset()), st.frozensets(st.integers(1, 60), max_size=3)),
    runs_ahead=st.booleans(),
)
def test_every_request_gets_its_tokens_whatever_the_schedule(
    setup: Setup, num_jobs: int, seed: int, failing_steps: frozenset[int], runs_ahead: bool
) -> None:
    jobs = [make_job(seed, number, setup.max_model_len) for number in range(num_jobs)]
    stats = Driver(setup, jobs, failing_steps, runs_ahead=runs_ahead).run().engine.stats()
    event(f"preempted: {stats.num_preemptions > 0}")
    event(f"prefix hits: {stats.prefix_cache_hits > 0}")


@pytest.mark.parametrize(("allocation", "scheduler"), POLICIES)
@pytest.mark.parametrize("num_blocks", [10, 40])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_hundred_requests_through_a_small_pool(
    allocation: str, scheduler: str, num_blocks: int, runs_ahead: bool
) -> None:
    setup = Setup(
        allocation, scheduler, num_blocks, max_model_len=160, budget=48, max_num_seqs=12, num_parallel=3
    )
    jobs = [make_job(num_blocks, number, 160, spread=60) for number in range(100)]
    stats = Driver(setup, jobs, runs_ahead=runs_ahead).run().engine.stats()
    if allocation == "contiguous":
        assert (stats.num_preemptions, stats.prefix_cache_hits) == (0, 0)
    else:
        assert stats.prefix_cache_hits > 500
        if scheduler == "continuous":
            assert stats.num_preemptions > 0


def test_prefix_cache_off_never_hits() -> None:
    setup = Setup("paged", "continuous", 20, max_model_len=160, budget=48, prefix_cache=False)
    stats = Driver(setup, [make_job(1, number, 160) for number in range(40)]).run().engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (0, 0)


@pytest.mark.parametrize(("allocation", "scheduler"), POLICIES)
def test_a_step_that_raises_ends_its_own_requests_only(allocation: str, scheduler: str) -> None:
    setup = Setup(allocation, scheduler, 8, max_model_len=32, budget=4, max_num_seqs=4, num_parallel=2)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    jobs = [Job([number + 3] * 9, params) for number in range(6)]
    driver = Driver(setup, jobs, failing_steps=frozenset({4})).run()
    failed = [job for job in jobs if job.reason is FinishReason.ERROR]
    assert 1 <= len(failed) <= 4
    assert all(job.error == "StepFailed: step 4" for job in failed)
    assert len([job for job in jobs if job.reason is FinishReason.LENGTH]) == len(jobs) - len(failed) >= 2
    assert driver.engine.stats().num_used_blocks == 0


def test_a_request_that_was_not_in_the_failing_step_goes_on() -> None:
    # Budget 4: the first prompt alone fills the step; the second request waits, then runs.
    setup = Setup("paged", "continuous", 8, max_model_len=32, budget=4)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    jobs = [Job([3] * 8, params), Job([4] * 3, params)]
    Driver(setup, jobs, failing_steps=frozenset({1})).run()
    assert [job.reason for job in jobs] == [FinishReason.ERROR, FinishReason.LENGTH]


def test_sequential_serves_one_after_the_other() -> None:
    setup = Setup("contiguous", "sequential", 16, max_model_len=64, budget=64)
    jobs = [Job([3 + number] * 5, SamplingParams(max_tokens=4, ignore_eos=True)) for number in range(3)]
    driver = Driver(setup, jobs)
    driver.run()
    assert driver.runner.num_steps == 3 * 4  # nothing overlaps


def test_continuous_serves_all_at_once() -> None:
    setup = Setup("paged", "continuous", 16, max_model_len=64, budget=64)
    jobs = [Job([3 + number] * 5, SamplingParams(max_tokens=4, ignore_eos=True)) for number in range(3)]
    driver = Driver(setup, jobs)
    driver.run()
    assert driver.runner.num_steps == 4


def test_a_long_prompt_does_not_stall_a_decode() -> None:
    setup = Setup("paged", "continuous", 40, max_model_len=320, budget=8)
    jobs = [
        Job([3] * 4, SamplingParams(max_tokens=30, ignore_eos=True)),
        Job([4] * 210, SamplingParams(max_tokens=1), arrival_step=1),
    ]
    driver = Driver(setup, jobs)
    driver.add(0)
    driver.step()
    driver.add(1)
    for num_tokens in range(2, 31):
        driver.step()
        assert len(jobs[0].token_ids) == num_tokens
    # Seven tokens of its prompt went into each of those steps; from now on, all eight.
    long = driver.engine.scheduler.running[0]
    assert long.num_computed_tokens == 29 * 7
    driver.step()
    assert jobs[1].reason is not None


def test_victim_is_the_last_admitted_and_comes_back_first() -> None:
    setup = Setup("paged", "continuous", 6, max_model_len=96, budget=96, prefix_cache=False)
    jobs = [Job([3 + n] * 15, SamplingParams(max_tokens=60, ignore_eos=True)) for n in range(4)]
    driver = Driver(setup, jobs)
    for number in range(4):
        driver.add(number)
    scheduler = driver.engine.scheduler

    def queues() -> tuple[str, str]:
        return tuple("".join(r.request_id for r in queue) for queue in (scheduler.running, scheduler.waiting))

    driver.step()
    assert queues() == ("012", "3")  # the fourth would leave fewer free blocks than there are sequences
    while not scheduler.num_preemptions:
        driver.step()
    assert queues() == ("01", "23")
    while "0" in queues()[0]:
        driver.step()
        assert queues() in (("01", "23"), ("0", "123"), ("1", "23"), ("", "123"))
    while driver.engine.has_work:
        driver.step()
    driver.check_answers()


def test_preemption_is_counted_for_its_request() -> None:
    setup = Setup("paged", "continuous", 4, max_model_len=64, budget=64, prefix_cache=False)
    engine = setup.engine(FakeRunner())
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for name in ("old", "young"):
        engine.add(name, [3] * 15, params)
    finished: dict[str, EngineEvent] = {}
    while engine.has_work:
        for event_ in engine.step():
            if event_.finish_reason is not None:
                finished[event_.request_id] = event_
    counts = {name: event_.metrics.num_preemptions for name, event_ in finished.items() if event_.metrics}
    assert counts["old"] == 0
    assert counts["young"] == engine.stats().num_preemptions > 0


def test_abort_waiting_running_unknown_and_twice() -> None:
    setup = Setup("paged", "continuous", 4, max_model_len=64, budget=64, max_num_seqs=1)
    engine = setup.engine(FakeRunner())
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    engine.add("running", [3] * 20, params)
    engine.add("waiting", [4] * 20, params)
    engine.step()
    assert engine.stats().num_used_blocks == 2
    for name in ("waiting", "running"):
        aborted = engine.abort(name)
        assert aborted is not None
        assert (aborted.request_id, aborted.finish_reason) == (name, FinishReason.ABORT)
        assert aborted.metrics is not None
        engine.check_integrity()
        assert engine.abort(name) is None
    assert engine.abort("nobody") is None
    assert not engine.has_work
    assert engine.step() == []
    assert engine.stats().num_used_blocks == 0


def test_abort_of_a_preempted_request() -> None:
    setup = Setup("paged", "continuous", 4, max_model_len=64, budget=64)
    engine = setup.engine(FakeRunner())
    for name in ("old", "young"):
        engine.add(name, [3] * 15, SamplingParams(max_tokens=40, ignore_eos=True))
    while not engine.stats().num_preemptions:
        engine.step()
    assert engine.abort("young") is not None
    engine.check_integrity()
    while engine.has_work:
        engine.step()
    assert engine.stats().num_used_blocks == 0


def test_an_id_in_use_is_refused_and_a_finished_one_is_free_again() -> None:
    setup = Setup("paged", "continuous", 4, max_model_len=64, budget=64)
    engine = setup.engine(FakeRunner())
    params = SamplingParams(max_tokens=1)
    engine.add("a", [3], params)
    with pytest.raises(InvalidRequestError, match="'a'"):
        engine.add("a", [4], params)
    engine.check_integrity()
    assert len(engine.step()) == 1
    engine.add("a", [4], params)
    engine.abort("a")
    engine.add("a", [4], params)
    assert len(engine.step()) == 1


@pytest.mark.parametrize("allocation", ["paged", "contiguous"])
def test_what_can_never_fit_is_refused_with_both_numbers(allocation: str) -> None:
    setup = Setup(allocation, "continuous", 3, max_model_len=64, budget=64)
    engine = setup.engine(FakeRunner())
    with pytest.raises(InvalidRequestError, match=r"3 blocks.*64 tokens"):
        engine.add("a", [3] * 60, SamplingParams(max_tokens=None))
    engine.check_integrity()
    assert not engine.has_work


def test_budget_smaller_than_max_num_seqs_limits_how_many_run() -> None:
    setup = Setup("paged", "continuous", 64, max_model_len=32, budget=3, max_num_seqs=10)
    jobs = [Job([3] * 2, SamplingParams(max_tokens=5, ignore_eos=True)) for _ in range(10)]
    Driver(setup, jobs).run()


def test_first_admission_is_what_the_metrics_keep() -> None:
    setup = Setup("paged", "continuous", 8, max_model_len=64, budget=64)
    engine = setup.engine(FakeRunner())
    params = SamplingParams(max_tokens=1)
    events = []
    for name in ("first", "second"):
        engine.add(name, [3] * 40, params)
        events += engine.step()
    cached = [event_.metrics.num_cached_tokens for event_ in events if event_.metrics]
    assert cached == [0, 32]


def test_who_is_begun_behind_a_cached_prefix_is_told_once() -> None:
    """With an event that has no tokens, in the first of the steps that its prompt takes."""
    setup = Setup("paged", "continuous", 40, max_model_len=320, budget=32)
    engine = setup.engine(FakeRunner())
    engine.add("first", [3] * 64, SamplingParams(max_tokens=1))
    while engine.has_work:
        engine.step()
    engine.add("second", [3] * 64 + [4] * 200, SamplingParams(max_tokens=1))
    assert engine.step() == [EngineEvent("second", [])]
    assert engine.stats().prefix_cache_hits == 64
    assert engine.step() == []


def test_the_tokens_of_each_step_are_counted() -> None:
    setup = Setup("paged", "continuous", 8, max_model_len=64, budget=16)
    engine = setup.engine(FakeRunner())
    engine.add("a", [3] * 40, SamplingParams(max_tokens=4, ignore_eos=True))
    counts = [0]
    while engine.has_work:
        engine.step()
        counts.append(engine.stats().num_step_tokens)
    assert [after - before for before, after in itertools.pairwise(counts)] == [16, 16, 8, 1, 1, 1]


def test_requests_of_one_step_share_the_blocks_that_it_computes() -> None:
    """The samples of a prompt, or a burst with one system prompt: only the first computes the full blocks."""
    setup = Setup("paged", "continuous", 20, max_model_len=80, budget=200)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    driver = Driver(setup, [Job([5] * 40, params) for _ in range(3)])
    for number in range(3):
        driver.add(number)
    driver.step()
    assert [num_tokens for _, _, num_tokens in driver.runner.last_batch] == [40, 8, 8]
    assert driver.engine.stats().num_used_blocks == 2 + 3
    while driver.engine.has_work:
        driver.step()
    driver.check_answers()


def test_a_failed_step_leaves_nothing_to_share() -> None:
    setup = Setup("paged", "continuous", 20, max_model_len=80, budget=200)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    jobs = [Job([5] * 40, params), Job([5] * 40, params, arrival_step=1)]
    stats = Driver(setup, jobs, failing_steps=frozenset({1})).run().engine.stats()
    assert [job.reason for job in jobs] == [FinishReason.ERROR, FinishReason.LENGTH]
    assert stats.prefix_cache_hits == 0
