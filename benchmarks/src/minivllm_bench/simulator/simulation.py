"""The loop: traffic into an engine, step by step, under a virtual clock."""

from __future__ import annotations

import gc
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from minivllm.engine.engine import Engine
from minivllm.errors import InvalidRequestError
from minivllm.request import EngineEvent, EngineStats, SamplingParams
from minivllm_bench.records import RequestRecord
from minivllm_bench.simulator.clock import VirtualClock
from minivllm_bench.simulator.runner import TOKEN_ID
from minivllm_bench.workloads import Session, Sessions

STATS_SECONDS = 0.5


@dataclass(slots=True)
class _Chat:
    """A session that has begun: how far it is, and all that was said."""

    number: int
    session: Session
    is_users: bool
    """Whether a user of the closed loop waits for its end."""
    turn: int = 0
    said: list[int] = field(default_factory=list)

    def next_prompt(self) -> list[int]:
        """All that was said before, and what this turn adds to it.

        Sessions differ from their first own token on, and nothing else matters: the prefix cache looks at
        whether tokens are equal, and nobody at what they are.
        """
        if not self.said:
            self.said = [TOKEN_ID] * self.session.shared_prefix_tokens
        self.said += [1 + self.number] * self.session.turns[self.turn].prompt_tokens
        return self.said


class Simulation:
    """Traffic through one engine.

    Args:
        engine: over a :class:`~minivllm_bench.simulator.runner.SimulatedRunner`.
        clock: of the engine and of its runner.
        users: sessions in a closed loop: so many at all times.
        sessions: what users do, in the order in which they come to it.
        arrivals: when sessions of an open loop begin, in seconds since the run began, and those sessions.
    """

    def __init__(
        self,
        engine: Engine,
        clock: VirtualClock,
        *,
        users: int = 0,
        sessions: Sessions | None = None,
        arrivals: Iterable[tuple[float, Session]] = (),
    ) -> None:
        self.records: list[RequestRecord] = []
        """Of every request that was sent, in order of sending."""
        self.stats: list[tuple[float, EngineStats]] = []
        """The engine's, every half second: seconds since the run began, and what it said then."""
        self._engine = engine
        self._clock = clock
        self._start = clock.now
        self._sessions = sessions or iter(())
        self._arrivals: Iterator[tuple[float, Session]] = iter(arrivals)
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, _Chat]] = []  # a heap: when the next turn is sent
        self._records: dict[str, tuple[RequestRecord, _Chat]] = {}  # of requests that run
        self._begin_next_arrival()
        for _ in range(users):
            self._begin_users_session()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return self._clock.now - self._start

    def run(self, seconds: float = math.inf) -> list[RequestRecord]:
        """Until nothing is left, or so much time has passed; what hasn't ended then stays unfinished.

        Python's garbage collector rests meanwhile: there are no cycles here to find, and it would look at
        every list of times again and again.
        """
        is_enabled = gc.isenabled()
        gc.disable()
        try:
            self._run(seconds)
        finally:
            if is_enabled:
                gc.enable()
        return self.records

    def _run(self, seconds: float) -> None:
        end = self._start + seconds
        engine, clock, waiting = self._engine, self._clock, self._waiting
        while clock.now < end:
            if clock.now >= self._start + len(self.stats) * STATS_SECONDS:
                self.stats.append((self.seconds, engine.stats()))
            while waiting and waiting[0][0] <= clock.now:
                sent, _, chat = heapq.heappop(waiting)
                self._send(chat, sent)
            if engine.has_work:
                self._take(engine.step())
            elif waiting:
                clock.advance_to(min(waiting[0][0], end))
            else:
                break

    def _begin_next_arrival(self) -> None:
        """At most one arrival waits: whoever makes them may do so without end."""
        arrival = next(self._arrivals, None)
        if arrival is not None:
            time, session = arrival
            self._send_at(_Chat(next(self._numbers), session, is_users=False), self._start + time)

    def _begin_users_session(self) -> None:
        session = next(self._sessions, None)
        if session is not None:
            self._send_at(_Chat(next(self._numbers), session, is_users=True), self._clock.now)

    def _send_at(self, chat: _Chat, moment: float) -> None:
        heapq.heappush(self._waiting, (moment, chat.number, chat))

    def _send(self, chat: _Chat, moment: float) -> None:
        if chat.turn == 0 and not chat.is_users:
            self._begin_next_arrival()
        prompt = chat.next_prompt()
        record = RequestRecord(chat.number, chat.turn, moment - self._start, len(prompt))
        request_id = f"{chat.number}.{chat.turn}"
        output_tokens = chat.session.turns[chat.turn].output_tokens
        self.records.append(record)
        longest = self._engine.info.max_model_len
        try:
            if record.prompt_tokens + output_tokens > longest:
                raise InvalidRequestError(
                    f"{record.prompt_tokens + output_tokens} tokens are more than --max-model-len {longest}"
                )
            self._engine.add(
                request_id, list(prompt), SamplingParams(max_tokens=output_tokens, ignore_eos=True)
            )
        except InvalidRequestError as error:
            record.error = str(error)
            self._end(record, chat)
        else:
            self._records[request_id] = record, chat

    def _take(self, events: list[EngineEvent]) -> None:
        """Write down who got a token. This is once per sequence and step: nothing slow here."""
        now, records = self._clock.now - self._start, self._records
        for event in events:
            record, chat = records[event.request_id]
            if event.new_token_ids:
                record.chunk_times.append(now)
            if event.finish_reason is not None:
                del records[event.request_id]
                record.output_tokens = len(record.chunk_times)
                if event.metrics is not None:
                    record.cached_tokens = event.metrics.num_cached_tokens
                self._end(record, chat)

    def _end(self, record: RequestRecord, chat: _Chat) -> None:
        """After an error the session goes on, as a user would; only the answer is missing."""
        record.finished = self.seconds
        chat.said += [TOKEN_ID] * record.output_tokens
        chat.turn += 1
        if chat.turn < len(chat.session.turns):
            self._send_at(chat, self._clock.now)
        elif chat.is_users:
            self._begin_users_session()
