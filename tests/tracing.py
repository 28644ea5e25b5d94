"""A traced engine over a fake runner, on a clock of its own, and the same story told without the tracer."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from minivllm.engine.engine import Engine
from minivllm.engine.runner import PendingTokens
from minivllm.engine.scheduler import SampledToken, ScheduledBatch
from minivllm.engine.steps import Sink, StepRecord
from minivllm.request import EngineEvent, Terms
from tests.engine.test_scheduler import FakeRunner, Job, Setup

LAUNCH, COMPUTE, UPDATE = 0.25, 2.0, 0.125
"""Seconds that a step takes on the host, on the device, and on the host again."""


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 1.0

    def __call__(self) -> float:
        return self.now


class TimedRunner(FakeRunner):
    """Takes :data:`LAUNCH` and then :data:`COMPUTE` seconds, the second on a device of its own if it runs
    ahead; notes every step that it is asked for."""

    def __init__(self, clock: Clock, failing_steps: frozenset[int], *, runs_ahead: bool) -> None:
        super().__init__(failing_steps, runs_ahead=runs_ahead)
        self.clock = clock
        self.steps: list[list[tuple[str, int, int]]] = []
        self.device_free = 0.0

    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        self.steps.append([(item.request.request_id, item.start, item.num_tokens) for item in batch.requests])
        start = self.clock.now
        self.clock.now += LAUNCH if self.runs_ahead else LAUNCH + COMPUTE
        tokens = super().execute(batch)
        self.device_free = max(start, self.device_free) + COMPUTE
        done = self.device_free

        def fetch() -> list[SampledToken | None]:
            if self.runs_ahead:
                self.clock.now = max(self.clock.now, done)
            return tokens()

        return fetch


@dataclass
class Story:
    """What a run looked like from outside, and the records of it."""

    engine: Engine
    runner: TimedRunner
    clock: Clock
    records: list[StepRecord] = field(default_factory=list)
    num_tokens: Counter[str] = field(default_factory=Counter)
    endings: dict[str, EngineEvent] = field(default_factory=dict)

    def take(self, events: list[EngineEvent]) -> None:
        for event in events:
            self.num_tokens[event.request_id] += len(event.new_token_ids)
            if event.finish_reason is not None:
                self.endings[event.request_id] = event

    def add(self, name: str, job: Job, client_id: str | None = None) -> None:
        self.engine.add(name, list(job.prompt), job.params, Terms(client_id=client_id))

    def step(self) -> None:
        self.take(self.engine.step())
        self.clock.now += UPDATE

    def abort(self, name: str) -> None:
        event = self.engine.abort(name)
        if event is not None:
            self.take([event])

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()

    def recomputed(self) -> dict[str, int]:
        """By request: tokens computed at positions whose keys and values it had had before."""
        had: dict[str, set[int]] = defaultdict(set)
        again: dict[str, int] = defaultdict(int)
        for step in self.runner.steps:
            for name, start, num_tokens in step:
                again[name] += len(had[name].intersection(range(start, start + num_tokens)))
                had[name].update(
                    range(start + num_tokens)
                )  # the first of them, perhaps, from the prefix cache
        return again


def begin(
    setup: Setup,
    *sinks: Sink,
    failing_steps: frozenset[int] = frozenset(),
    runs_ahead: bool = False,
    clock: Clock | None = None,
) -> Story:
    """An engine whose records go to the story and to ``sinks``."""
    clock = clock or Clock()
    records: list[StepRecord] = []

    def sink(record: StepRecord) -> None:
        assert record.end_time > 0.0, "a step is told before it is over"
        records.append(record)

    runner = TimedRunner(clock, failing_steps, runs_ahead=runs_ahead)
    engine = setup.engine(runner, clock=clock, sinks=(sink, *sinks))
    return Story(engine, runner, clock, records)


def play(story: Story, jobs: list[Job]) -> Story:
    """Add and abort the jobs at their steps, and step until all have ended."""
    now = 0
    while now <= max(job.arrival_step for job in jobs) or story.engine.has_work:
        for number, job in enumerate(jobs):
            if job.arrival_step == now:
                story.add(str(number), job)
        for number, job in enumerate(jobs):
            if job.abort_step == now:
                story.abort(str(number))
        story.step()
        now += 1
    return story
