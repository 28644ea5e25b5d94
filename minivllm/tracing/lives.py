"""What became of each request, put together from the records of the steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from minivllm.engine.steps import Arrival, Ending, StepRecord

NEXT_STEP = "next_step"
"""What a request waits for before the scheduler has looked at it."""

Waits = dict[str, float]
"""Seconds by what a request waited for: :data:`NEXT_STEP`, or a word of :attr:`StepRecord.waits_for`."""


def add_up(waits: Iterable[Waits]) -> Waits:
    """All of them together, the longest first."""
    total: Waits = defaultdict(float)
    for each in waits:
        for reason, seconds in each.items():
            total[reason] += seconds
    return dict(sorted(total.items(), key=lambda item: -item[1]))


@dataclass(slots=True)
class Stay:
    """One time in the queue, and in the running batch after it."""

    queued_time: float
    """When it began to wait."""
    waits: Waits = field(default_factory=dict)
    num_running: int = 0
    """How many ran when it was first left waiting."""
    admitted_time: float | None = None
    num_cached_tokens: int = 0
    num_prefill_steps: int = 0
    first_token_time: float | None = None
    """When it had the first token of this stay: its prefill was over."""
    evicted_time: float | None = None
    evicted_step: int = 0


@dataclass(slots=True)
class Life:
    """One request, from its arrival to its end or that of the trace. Times are seconds, as in the records."""

    arrival: Arrival
    stays: list[Stay]
    """In its order: one, and one more for each eviction."""
    num_recomputed_tokens: int = 0
    """Tokens whose keys and values it had, lost in an eviction, and computed again."""
    num_output_tokens: int = 0
    first_token_time: float | None = None
    last_token_time: float = 0.0
    slowest_gap: float = 0.0
    """Longest time between two tokens with no eviction between them."""
    slowest_step: int = 0
    """The step that brought the later one."""
    slowest_prefill_tokens: int = 0
    """Tokens of others' prompts in that step."""
    ending: Ending | None = None
    _num_computed: int = 0

    @property
    def request_id(self) -> str:
        """The engine's id for it."""
        return self.arrival.request_id

    @property
    def evictions(self) -> list[Stay]:
        """The stays that ended with one."""
        return [stay for stay in self.stays if stay.evicted_time is not None]

    def end(self, now: float) -> float:
        """When it was over; ``now`` if it isn't."""
        return now if self.ending is None else self.ending.time

    @property
    def waits(self) -> Waits:
        """Of all its stays."""
        return add_up(stay.waits for stay in self.stays)

    def compute(self, start: int, num_tokens: int) -> None:
        """So many tokens from that position on went through the model."""
        self.num_recomputed_tokens += max(0, min(start + num_tokens, self._num_computed) - start)
        self._num_computed = max(self._num_computed, start + num_tokens)

    def take_token(self, record: StepRecord) -> None:
        """It got one from that step."""
        now, stay = record.tokens_time, self.stays[-1]
        is_first_of_stay = stay.first_token_time is None
        if is_first_of_stay:
            stay.first_token_time = now
        if self.first_token_time is None:
            self.first_token_time = now
        elif not is_first_of_stay and now - self.last_token_time > self.slowest_gap:
            self.slowest_gap, self.slowest_step = now - self.last_token_time, record.number
            self.slowest_prefill_tokens = record.num_prefill_tokens
        self.last_token_time = now
        self.num_output_tokens += 1


class Lives:
    """Follows step records, in their order, and keeps a :class:`Life` of each request that they tell of."""

    def __init__(self) -> None:
        self.all: list[Life] = []
        """In order of arrival."""
        self._alive: dict[str, Life] = {}
        self._waited: Waits = defaultdict(float)
        """Seconds until the last step was scheduled, by what the first in the queue waited for."""
        self._waits_for = NEXT_STEP
        self._schedule_time = 0.0
        self._before: dict[str, Waits] = {}
        """Of each request in the queue: ``_waited`` when it began to wait."""

    def follow(self, record: StepRecord) -> None:
        """Take in one more step."""
        self._waited[self._waits_for] += max(0.0, record.schedule_time - self._schedule_time)
        self._schedule_time, self._waits_for = record.schedule_time, record.waits_for or NEXT_STEP
        for arrival in record.arrived:
            self._arrive(arrival, record)
        for ending in record.ended:
            if ending.time <= record.schedule_time:
                self._end(ending)
        for eviction in record.evicted:
            life = self._alive.get(eviction.request_id)
            if life is not None:  # else it ended while the step was being prepared
                stay = life.stays[-1]
                stay.evicted_time, stay.evicted_step = record.schedule_time, record.number
                life.stays.append(Stay(record.schedule_time, num_running=record.num_running))
                self._before[life.request_id] = dict(self._waited)
        for admission in record.admitted:
            life = self._alive.get(admission.request_id)
            if life is not None:
                stay = life.stays[-1]
                self._stop_waiting(life)
                stay.admitted_time = record.schedule_time
                stay.num_cached_tokens = admission.num_cached_tokens
        self._run(record)
        for ending in record.ended:
            self._end(ending)

    def finish(self, now: float) -> None:
        """No more steps come: whoever still waits has waited until now."""
        self._waited[self._waits_for] += max(0.0, now - self._schedule_time)
        self._schedule_time = now
        for request_id in list(self._before):
            self._stop_waiting(self._alive[request_id])

    def _arrive(self, arrival: Arrival, record: StepRecord) -> None:
        stay = Stay(arrival.queued_time, num_running=record.num_running)
        stay.waits[NEXT_STEP] = max(0.0, record.schedule_time - arrival.queued_time)
        life = Life(arrival, [stay])
        self.all.append(life)
        self._alive[arrival.request_id] = life
        self._before[arrival.request_id] = dict(self._waited)

    def _run(self, record: StepRecord) -> None:
        without_token = {
            *record.dropped,
            *(item.request_id for item in record.ended if item.error is not None),
        }
        if record.error is not None:
            without_token.update(record.decodes, (item.request_id for item in record.prefills))
        for request_id, context in record.decodes.items():
            life = self._alive.get(request_id)
            if life is not None:
                life.compute(context, 1)
                if request_id not in without_token:
                    life.take_token(record)
        for item in record.prefills:
            life = self._alive.get(item.request_id)
            if life is not None:
                life.compute(item.start, item.num_tokens)
                life.stays[-1].num_prefill_steps += 1
                if item.is_last and item.request_id not in without_token:
                    life.take_token(record)

    def _end(self, ending: Ending) -> None:
        life = self._alive.pop(ending.request_id, None)
        if life is not None:
            life.ending = ending
            self._stop_waiting(life)

    def _stop_waiting(self, life: Life) -> None:
        before = self._before.pop(life.request_id, None)
        if before is not None:
            since = {reason: seconds - before.get(reason, 0.0) for reason, seconds in self._waited.items()}
            stay = life.stays[-1]
            stay.waits = {
                reason: seconds for reason, seconds in add_up((stay.waits, since)).items() if seconds
            }
