"""The engine: requests in, one step at a time, events out.

``LLM`` runs it in-process; the server runs it in a process of its own (``process.py``).
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from minivllm.config import EngineConfig
from minivllm.engine.block_manager import BlockManager, ContiguousBlockManager, PagedBlockManager
from minivllm.engine.grammar import Grammars, GrammarState, wait_for_any
from minivllm.engine.runner import PendingTokens, Runner
from minivllm.engine.scheduler import (
    ContinuousScheduler,
    ScheduledBatch,
    Scheduler,
    SchedulerLimits,
    SequentialScheduler,
)
from minivllm.engine.steps import Sink, StepRecord, StepRecorder
from minivllm.engine.waiting import FairQueue, WaitingQueue
from minivllm.errors import InvalidRequestError
from minivllm.request import (
    DEFAULT_TERMS,
    EngineEvent,
    EngineInfo,
    EngineStats,
    Request,
    RequestMetrics,
    SamplingParams,
    Terms,
)

logger = logging.getLogger(__name__)

STEPS_BEFORE_GROWTH = 1000
"""So many steps after one that didn't fit into memory, they may be twice as large again: the first time."""


class _Step(NamedTuple):
    batch: ScheduledBatch
    tokens: PendingTokens
    record: StepRecord | None


class Engine:
    """Schedule → execute → update, over one runner.

    Where the runner is a GPU, it computes a step while the host takes in the tokens of the step before
    and prepares the next: the card doesn't wait for Python. A request that turns out to have ended was
    then computed for once too often, and that token is dropped.

    Args:
        config: chooses the block manager and the scheduler; nothing else looks at those two flags.
        runner: executes steps.
        info: the limits that :func:`minivllm.request.check_request` has held requests to.
        num_blocks: of the runner's KV pool.
        max_num_batched_tokens: most tokens in one step.
        eos_token_ids: ids that end a turn.
        grammars: what requests with a grammar need; None where none may have one.
        clock: seconds, above 0, for the requests' metrics; a simulation has one of its own.
        sinks: get a record of each step; without any, none are made.
        idle_work: advanced once by each :meth:`prepare`, while there is nothing else to do.
        block_manager: an experiment's own, of ``num_blocks`` blocks, instead of the one that config names.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        info: EngineInfo,
        *,
        num_blocks: int,
        max_num_batched_tokens: int,
        eos_token_ids: frozenset[int],
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
        sinks: Sequence[Sink] = (),
        idle_work: Iterable[object] = (),
        block_manager: BlockManager | None = None,
    ) -> None:
        self.clock = clock
        self._recorder = StepRecorder(sinks, clock) if sinks else None
        self.info = info
        self.grammars = grammars
        self.runner = runner
        self._idle_work = iter(idle_work)
        self.block_manager: BlockManager
        if block_manager is not None:
            self.block_manager = block_manager
        elif config.kv_allocation == "paged":
            self.block_manager = PagedBlockManager(num_blocks, use_prefix_cache=config.use_prefix_cache)
        else:
            self.block_manager = ContiguousBlockManager(num_blocks, max_model_len=info.max_model_len)
        limits = SchedulerLimits(
            # Every running sequence needs at least one token of a step's budget.
            max_num_seqs=min(config.max_num_seqs, max_num_batched_tokens),
            max_num_batched_tokens=max_num_batched_tokens,
            num_parallel=config.num_slots,
            eos_token_ids=eos_token_ids,
        )
        schedulers: dict[str, type[Scheduler]] = {
            "continuous": ContinuousScheduler,
            "sequential": SequentialScheduler,
        }
        waiting = FairQueue() if config.fairness == "keys" else WaitingQueue()
        self.scheduler = schedulers[config.scheduler](self.block_manager, limits, clock, waiting)
        self._requests: dict[str, Request] = {}
        self._compiling: dict[Request, GrammarState] = {}
        """Requests that aren't in the scheduler's queue yet, because their grammars are being compiled."""
        self._deadlines: dict[Request, float] = {}
        """Of the requests that have one."""
        self._next_deadline = math.inf
        """No deadline is earlier."""
        self._in_flight: deque[_Step] = deque()
        """Steps that were started and whose tokens haven't been taken in, oldest first."""
        self._num_step_tokens = 0
        self._num_small_steps = 0
        """Since one didn't fit into memory."""
        self._steps_before_growth = STEPS_BEFORE_GROWTH
        self._waits_for: str | None = None
        self._seeds = random.Random(config.seed)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would do anything."""
        return self.scheduler.has_work or bool(self._in_flight) or bool(self._compiling)

    def prepare(self) -> bool:
        """Do a little of what makes later steps faster. Returns False when nothing is left to do."""
        return next(self._idle_work, None) is not None

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        terms: Terms = DEFAULT_TERMS,
    ) -> None:
        """Queue a request that :func:`minivllm.request.check_request` has let through.

        Raises:
            InvalidRequestError: the id is taken, the sequence could never fit into the KV pool, or a
                grammar is given and can't be followed here.
        """
        if request_id in self._requests:
            raise InvalidRequestError(f"request id {request_id!r} is in use by an unfinished request")
        num_prompt, limit = len(prompt_token_ids), self.info.max_model_len
        max_tokens = limit if sampling.max_tokens is None else sampling.max_tokens
        max_total_tokens = min(num_prompt + max_tokens, limit)
        if not self.block_manager.can_ever_fit(max_total_tokens):
            raise InvalidRequestError(
                f"the KV cache has {self.block_manager.num_blocks} blocks, "
                f"too few for the {max_total_tokens} tokens of this request"
            )
        request = Request(
            request_id,
            prompt_token_ids,
            sampling,
            seed=self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed,
            max_total_tokens=max_total_tokens,
            terms=terms,
            metrics=RequestMetrics(arrival_time=self.clock()),
        )
        if sampling.grammar is None:
            self._queue(request)
        elif self.grammars is None:
            raise InvalidRequestError("this engine has no tokenizer to follow one with", param="grammar")
        else:
            request.grammar = self._compiling[request] = self.grammars.begin(sampling.grammar)
        self._requests[request_id] = request
        if terms.timeout is not None:
            self._deadlines[request] = request.metrics.arrival_time + terms.timeout
            self._next_deadline = min(self._next_deadline, self._deadlines[request])

    def abort(self, request_id: str) -> EngineEvent | None:
        """End a request now. None if it has ended already."""
        if request_id not in self._requests:
            return None
        event = self._withdraw(self._forget(request_id), self.scheduler.abort)
        if self._recorder is not None and not self.has_work:
            self._recorder.open(self.clock(), ScheduledBatch([]), self.stats())  # no step may follow
        return event

    def step(self) -> list[EngineEvent]:
        """Start a step over all that is scheduled, and take in the tokens of the one that ran until now.

        A runner that doesn't run ahead has its tokens at once. A step that raises ends its own
        requests only.
        """
        events = self._queue_compiled()
        if self._deadlines and self._next_deadline <= self.clock():
            events += self._drop_late()
        if self._in_flight and self._in_flight[0].batch.reads_output:
            events += self._take_in()
        start = self.clock()
        batch = self.scheduler.schedule()
        self._waits_for = batch.waits_for
        record = None if self._recorder is None else self._recorder.open(start, batch, self.stats())
        if batch.requests:
            events += self._start(batch, record)
        num_ahead = 1 if self.runner.runs_ahead and batch.requests else 0
        while len(self._in_flight) > num_ahead:
            events += self._take_in()
        for event in events:
            if event.finish_reason is not None:
                self._forget(event.request_id)
        return events

    def _forget(self, request_id: str) -> Request:
        request = self._requests.pop(request_id)
        self._deadlines.pop(request, None)
        return request

    def _queue(self, request: Request) -> None:
        self.scheduler.add(request)
        if self._recorder is not None:
            self._recorder.arrived(request)

    def _queue_compiled(self) -> list[EngineEvent]:
        """Queue the requests whose grammars are ready. Without other work, waits a moment for one."""
        if not self._compiling:
            return []
        if not self.scheduler.has_work and not self._in_flight:
            wait_for_any(self._compiling.values(), timeout=0.005)
        events = []
        for request in [request for request, grammar in self._compiling.items() if grammar.is_ready]:
            error = self._compiling[request].error
            if error is not None:
                events.append(self._withdraw(request, partial(self.scheduler.refuse, error=error)))
            else:
                del self._compiling[request]
                self._queue(request)
        return events

    def _drop_late(self) -> list[EngineEvent]:
        """End the requests whose deadlines have passed, before anybody is evicted for them."""
        now = self.clock()
        late = [request for request, deadline in self._deadlines.items() if deadline <= now]
        for request in late:
            del self._deadlines[request]
        self._next_deadline = min(self._deadlines.values(), default=math.inf)
        return [self._withdraw(request, self.scheduler.expire) for request in late]

    def _withdraw(self, request: Request, end: Callable[[Request], EngineEvent]) -> EngineEvent:
        """End a request wherever it is."""
        if self._compiling.pop(request, None) is not None:
            self._queue(request)
        event = end(request)
        if self._recorder is not None:
            self._recorder.ended(event)
        return event

    def _start(self, batch: ScheduledBatch, record: StepRecord | None) -> list[EngineEvent]:
        try:
            tokens = self.runner.execute(batch)
        except MemoryError as error:
            if batch.num_tokens == 1:
                return self._fail(batch, record, error)
            return self._shrink(batch, record, error)
        except Exception as error:
            return self._fail(batch, record, error)
        self._num_step_tokens += batch.num_tokens
        if self.scheduler.max_num_batched_tokens < self.scheduler.limits.max_num_batched_tokens:
            self._grow()
        self.scheduler.advance(batch)
        if record is not None:
            record.launched_time = self.clock()
        self._in_flight.append(_Step(batch, tokens, record))
        return []

    def _take_in(self) -> list[EngineEvent]:
        batch, tokens, record = self._in_flight.popleft()
        if record is not None:
            record.wait_time = self.clock()
        try:
            sampled = tokens()
        except Exception as error:
            return self._fail(batch, record, error)
        if record is not None:
            record.tokens_time = self.clock()
        events = self.scheduler.update(batch, sampled)
        if self._recorder is not None and record is not None:
            self._recorder.close(record, events)
        return events

    def _fail(self, batch: ScheduledBatch, record: StepRecord | None, error: Exception) -> list[EngineEvent]:
        logger.error("a step over %d requests failed", len(batch.requests), exc_info=error)
        message = f"{type(error).__name__}: {error}"
        events = self.scheduler.fail(batch, message)
        if self._recorder is not None and record is not None:
            self._recorder.fail(record, events, message)
        return events

    def _shrink(
        self, batch: ScheduledBatch, record: StepRecord | None, error: MemoryError
    ) -> list[EngineEvent]:
        """A step didn't fit into memory: the next ones have half as many tokens, and nobody fails."""
        evicted = self.scheduler.take_back(batch)
        if self._recorder is not None and record is not None:
            self._recorder.take_back(record, evicted)
        self.scheduler.max_num_batched_tokens = batch.num_tokens // 2
        if self._num_small_steps >= self._steps_before_growth:
            self._steps_before_growth *= 2  # growing again and again mustn't keep a long prompt from its end
        self._num_small_steps = 0
        logger.warning(
            "a step of %d tokens didn't fit into memory (%s): the next %d have at most %d; if it happens "
            "again, set --max-num-batched-tokens to that, or lower --gpu-memory-utilization",
            batch.num_tokens,
            error,
            self._steps_before_growth,
            self.scheduler.max_num_batched_tokens,
        )
        return []

    def _grow(self) -> None:
        """After so many small steps, try larger ones: what else was in the memory may have gone."""
        self._num_small_steps += 1
        if self._num_small_steps % self._steps_before_growth == 0:
            limit = self.scheduler.limits.max_num_batched_tokens
            self.scheduler.max_num_batched_tokens = min(2 * self.scheduler.max_num_batched_tokens, limit)

    def stats(self) -> EngineStats:
        """Counts at this moment."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self._compiling),
            num_used_blocks=self.block_manager.num_used_blocks,
            num_blocks=self.block_manager.num_blocks,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.block_manager.num_queried_tokens,
            prefix_cache_hits=self.block_manager.num_hit_tokens,
            num_step_tokens=self._num_step_tokens,
            num_compiling=len(self._compiling),
            waits_for=self._waits_for,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block and every request is accounted for."""
        self.scheduler.check_integrity()
        known = {*self.scheduler.running, *self.scheduler.waiting, *self._compiling}
        if set(self._requests.values()) != known:
            raise AssertionError("the engine and its scheduler disagree about the requests")
