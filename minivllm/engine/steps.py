"""What happened in each step, for whoever wants to know: a trace file, a debug route, a cost model.

The engine fills one :class:`StepRecord` a step and hands it to its sinks, in the order of the steps. A
record is plain data: ids, counts, and moments in seconds of the engine's clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minivllm.engine.scheduler import ScheduledBatch
from minivllm.request import EngineEvent, EngineStats, FinishReason, Request


class Arrival(NamedTuple):
    """A request that joined the queue."""

    request_id: str
    time: float
    """When it came."""
    queued_time: float
    """When it joined the queue: later than it came where its grammar had to be compiled."""
    num_prompt_tokens: int
    max_new_tokens: int
    priority: int
    client_id: str | None = None
    """What its client calls it, where it has a name of its own for it; not always unique."""

    @property
    def ids(self) -> tuple[str, ...]:
        """All that it goes by."""
        return (self.request_id,) if self.client_id is None else (self.request_id, self.client_id)


class Admission(NamedTuple):
    """A request that got blocks, for the first time or after an eviction."""

    request_id: str
    num_cached_tokens: int
    """Its first tokens, whose keys and values were in the prefix cache."""


class Eviction(NamedTuple):
    """A request that lost its blocks and is the first to wait again."""

    request_id: str
    num_computed_tokens: int
    """What is to be computed again, as far as the prefix cache doesn't keep it."""


class Prefill(NamedTuple):
    """Tokens of a prompt, or of what was evicted, that went through the model."""

    request_id: str
    start: int
    """Position of the first of them: so many came before."""
    num_tokens: int
    is_last: bool
    """Whether the request's next token was sampled from them."""


class Ending(NamedTuple):
    """A request that is over."""

    request_id: str
    time: float
    reason: FinishReason
    error: str | None


@dataclass(slots=True)
class StepRecord:
    """One step: who ran, who waited and why, and when.

    Its times are in this order. Where the runner runs ahead, the next step's first three fall between this
    one's ``launched_time`` and ``wait_time``.

    What came between two steps is in the later one's record. A record without decodes and prefills is of
    a step that computed nothing, but came with an end or an eviction.
    """

    number: int
    """From 1."""
    schedule_time: float
    """When the scheduler began."""
    execute_time: float
    """When it was done, and the runner was called."""
    launched_time: float = 0.0
    """When the runner returned: a CPU has computed the step then, on a GPU it has been queued."""
    wait_time: float = 0.0
    """When the host asked for the step's tokens."""
    tokens_time: float = 0.0
    """When it had them."""
    end_time: float = 0.0
    """When it had taken them in."""
    device_start: float = 0.0
    """The earliest moment at which the device can have begun with it: it had the step, and was done with the
    one before. It was done with this one by ``tokens_time``."""

    decodes: dict[str, int] = field(default_factory=dict)
    """One token each: by request id, the tokens that were in its KV cache before."""
    prefills: list[Prefill] = field(default_factory=list)
    arrived: list[Arrival] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    evicted: list[Eviction] = field(default_factory=list)
    ended: list[Ending] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Requests that it computed a token for and that had ended in the meantime."""
    waits_for: str | None = None
    """Why the first in the queue didn't run, as :attr:`ScheduledBatch.waits_for`."""
    num_waiting: int = 0
    """Once the step was scheduled, as the next two."""
    num_running: int = 0
    num_used_blocks: int = 0
    error: str | None = None
    """What it raised: its requests ended with that."""

    @property
    def schedule_seconds(self) -> float:
        """The host's time for choosing who runs."""
        return self.execute_time - self.schedule_time

    @property
    def execute_seconds(self) -> float:
        """The host's time for building the step's tensors and computing, or launching, it."""
        return self.launched_time - self.execute_time

    @property
    def wait_seconds(self) -> float:
        """The host's time for waiting until the device was done."""
        return self.tokens_time - self.wait_time

    @property
    def update_seconds(self) -> float:
        """The host's time for taking the tokens in."""
        return self.end_time - self.tokens_time

    @property
    def device_seconds(self) -> float:
        """How long the device was busy with it, at most."""
        return self.tokens_time - self.device_start

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of prompts, and of what was evicted."""
        return sum(item.num_tokens for item in self.prefills)

    @property
    def num_seqs(self) -> int:
        """Sequences that ran."""
        return len(self.decodes) + len(self.prefills)

    @property
    def num_tokens(self) -> int:
        """Tokens that went through the model."""
        return len(self.decodes) + self.num_prefill_tokens


Sink = Callable[[StepRecord], None]
"""Takes the records, in the order of the steps, each when its step is over."""


class StepRecorder:
    """Makes the records. The engine calls it where something happens, and only if there is somebody to tell.

    Args:
        sinks: are told of every step.
        clock: the engine's.
    """

    def __init__(self, sinks: Sequence[Sink], clock: Callable[[], float]) -> None:
        self.sinks = sinks
        self.clock = clock
        self._num_steps = 0
        self._open: deque[StepRecord] = deque()
        """Records that no sink has seen, oldest first: a later one may be complete before an earlier one."""
        self._device_free_time = 0.0
        self._arrived: list[Arrival] = []
        self._ended: list[Ending] = []

    def arrived(self, request: Request) -> None:
        """The request joins the queue now."""
        self._arrived.append(
            Arrival(
                request.request_id,
                request.metrics.arrival_time,
                self.clock() if request.sampling.grammar is not None else request.metrics.arrival_time,
                request.num_prompt_tokens,
                request.max_total_tokens - request.num_prompt_tokens,
                request.terms.priority,
                request.terms.client_id,
            )
        )

    def ended(self, event: EngineEvent) -> None:
        """The request was ended by something else than a step."""
        self._ended += _endings([event])

    def open(self, schedule_time: float, batch: ScheduledBatch, stats: EngineStats) -> StepRecord | None:
        """Begin the record of a step that has just been scheduled; None if there is nothing to tell."""
        if not (batch.requests or batch.evicted or self._ended):
            return None
        self._num_steps += 1
        record = StepRecord(self._num_steps, schedule_time, self.clock())
        record.arrived, self._arrived = self._arrived, []
        record.ended, self._ended = self._ended, []
        decodes, prefills = record.decodes, record.prefills
        for item in batch.requests:
            request = item.request
            if item.num_tokens == 1 and item.is_sampled and item.start >= len(request.prompt_token_ids):
                decodes[request.request_id] = item.start
            else:
                prefills.append(Prefill(request.request_id, item.start, item.num_tokens, item.is_sampled))
        num_kept = len(batch.requests) - batch.num_admitted
        record.admitted = [
            Admission(item.request.request_id, item.start) for item in batch.requests[num_kept:]
        ]
        record.evicted = _evictions(batch.evicted)
        record.waits_for = batch.waits_for
        record.num_waiting = stats.num_waiting
        record.num_running = stats.num_running
        record.num_used_blocks = stats.num_used_blocks
        self._open.append(record)
        if not batch.requests:
            self.fail(record, [], None)
        return record

    def close(self, record: StepRecord, events: list[EngineEvent]) -> None:
        """The step is over, and this is what it brought."""
        record.ended += _endings(events)
        num_sampled = len(record.decodes) + sum(item.is_last for item in record.prefills)
        told = {event.request_id for event in events if event.new_token_ids or event.finish_reason}
        if len(told) < num_sampled:
            sampled = [*record.decodes, *(item.request_id for item in record.prefills if item.is_last)]
            record.dropped = [request_id for request_id in sampled if request_id not in told]
        record.end_time = self.clock()
        while self._open and self._open[0].end_time > 0.0:
            done = self._open.popleft()
            # One that couldn't be started has ended before the one that was running.
            done.device_start = min(max(done.execute_time, self._device_free_time), done.tokens_time)
            self._device_free_time = max(self._device_free_time, done.tokens_time)
            for sink in self.sinks:
                sink(done)

    def take_back(self, record: StepRecord, evicted: list[tuple[Request, int]]) -> None:
        """The step didn't fit into memory: nothing was computed, and its requests were evicted."""
        record.decodes, record.prefills = {}, []
        record.evicted += _evictions(evicted)
        self.fail(record, [], None)

    def fail(self, record: StepRecord, events: list[EngineEvent], error: str | None) -> None:
        """The step is over, without tokens."""
        now = self.clock()
        record.launched_time = record.launched_time or now
        record.wait_time = record.wait_time or now
        record.tokens_time = now
        record.error = error
        self.close(record, events)


def _evictions(evicted: Iterable[tuple[Request, int]]) -> list[Eviction]:
    return [Eviction(request.request_id, num_computed) for request, num_computed in evicted]


def _endings(events: list[EngineEvent]) -> list[Ending]:
    return [
        Ending(
            event.request_id,
            0.0 if event.metrics is None else event.metrics.finished_time,
            event.finish_reason,
            event.error,
        )
        for event in events
        if event.finish_reason is not None
    ]
