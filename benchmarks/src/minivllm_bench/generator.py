"""Sends a workload's requests: so many users at once (a closed loop), or so many a second (an open loop)."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from minivllm.errors import MinivllmError
from minivllm_bench.load import Load, arrival_times
from minivllm_bench.prompts import Conversation, TextSource
from minivllm_bench.records import RequestRecord
from minivllm_bench.workloads import Session, Workload

Clock = Callable[[], float]
"""Seconds since the run began."""

Ask = Callable[[Conversation, int, RequestRecord, Clock], Awaitable[str]]
"""Sends a conversation, asks for so many tokens, writes all times and counts into the record, and returns the
answer's text. A failure goes into the record, too; what it raises ends the run."""

FAILURES_IN_A_ROW = 32
"""So many, or twice as many as there are users, and the run is over."""


class ServerFailedError(MinivllmError):
    """Request after request has failed: going on would measure nothing."""


class LoadGenerator:
    """One run. ``records`` grow while it lasts, and stay when it is broken off.

    Args:
        ask: sends one request; :meth:`minivllm_bench.client.Client.ask`.
        workload: what is asked.
        load: how it is sent.
    """

    def __init__(self, ask: Ask, workload: Workload, load: Load) -> None:
        self.records: list[RequestRecord] = []
        self.seconds = 0.0
        """How long the run lasted, without the time to drain. Known at its end, however it ends."""
        self.cpu_share = 0.0
        """Of one core, how much this process used meanwhile."""
        self._ask = ask
        self._load = load
        self._source = TextSource(load.seed)
        self._sessions = workload(random.Random(f"{load.seed}/sessions"))
        self._numbers = itertools.count()
        self._start = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures_in_a_row = 0

    async def run(self) -> None:
        """Send until the load's end, or the workload's.

        Raises:
            MinivllmError: what ``ask`` raises; a ServerFailedError if too many requests fail in a row.
        """
        loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = loop.create_future()
        self._start, cpu_start = loop.time(), time.process_time()
        load = self._load
        try:
            if load.users is not None:
                for _ in range(load.users):
                    self._spawn(self._use())
            else:
                self._spawn(self._arrive())
            limit = None if load.duration is None else load.duration + load.drain
            await asyncio.wait({self._end}, timeout=limit)
            if self._end.done():
                self._end.result()
        finally:
            elapsed = self._clock()
            self.seconds = elapsed if load.duration is None else min(elapsed, load.duration)
            self.cpu_share = (time.process_time() - cpu_start) / max(elapsed, 1e-9)
            left = list(self._tasks)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def _clock(self) -> float:
        return asyncio.get_running_loop().time() - self._start

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._has_left)

    def _has_left(self, task: asyncio.Task[None]) -> None:
        """The run ends with its last task, or with the first that raises."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if self._end.done():
            return
        if error is not None:
            self._end.set_exception(error)
        elif not self._tasks:
            self._end.set_result(None)

    async def _use(self) -> None:
        """One user of a closed loop."""
        while self._may_send() and (session := next(self._sessions, None)) is not None:
            await self._converse(session, None)

    async def _arrive(self) -> None:
        """The open loop: it starts each session on time, late ones at once."""
        assert self._load.rate is not None
        rng = random.Random(f"{self._load.seed}/arrivals")
        for arrival in arrival_times(self._load.rate, self._load.burstiness, rng):
            if self._load.duration is not None and arrival >= self._load.duration:
                return
            await asyncio.sleep(arrival - self._clock())
            if not self._may_send() or (session := next(self._sessions, None)) is None:
                return
            self._spawn(self._converse(session, arrival))

    def _may_send(self) -> bool:
        load = self._load
        return (load.num_requests is None or len(self.records) < load.num_requests) and (
            load.duration is None or self._clock() < load.duration
        )

    async def _converse(self, session: Session, arrival: float | None) -> None:
        """One session, turn after turn; a failed turn ends it."""
        number = next(self._numbers)
        conversation = Conversation(self._source, number, session)
        for place, turn in enumerate(session.turns):
            if not self._may_send():
                return
            conversation.ask(turn)
            is_first = place == 0 and arrival is not None
            sent = arrival if is_first and arrival is not None else self._clock()
            record = RequestRecord(number, place, sent, conversation.prompt_tokens)
            self.records.append(record)
            answer = await self._ask(conversation, turn.output_tokens, record, self._clock)
            if record.error is not None:
                self._count_failure(record.error)
                return
            self._failures_in_a_row = 0
            conversation.answer(answer, record.output_tokens)

    def _count_failure(self, error: str) -> None:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= max(FAILURES_IN_A_ROW, 2 * (self._load.users or 0)):
            raise ServerFailedError(f"the last {self._failures_in_a_row} requests failed: {error}")
