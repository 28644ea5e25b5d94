"""Who may wait for the engine: so many requests, and so many tokens of their prompts, and no more.

A request is counted when its body is there and before anything else is done with it, so that no burst slips
through; it waits until the engine has begun with its prompt.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from minivllm.config import ServerConfig
from minivllm.errors import OverloadedError
from minivllm.server.errors import error_response
from minivllm.server.rate_limit import TokenRateLimit
from minivllm.server.record import record_of

_COUNTED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
_RATE_SECONDS = 60.0
"""How far back starts are looked at for an estimate."""
_LONGEST_RETRY = 60


class Ticket:
    """One request's place, from its arrival to the end of its answer."""

    def __init__(self, room: WaitingRoom, number: int, arrived: float) -> None:
        self._room = room
        self._number = number
        self.arrived = arrived
        self.ids: frozenset[str] = frozenset()
        """What clients may call the request by."""
        self.owner = ""
        """The API key's name; nobody else may ask for this request."""
        self.priority = 0
        self.num_prompt_tokens = 0
        self.num_taken_tokens = 0
        """Of the key's tokens for this minute."""
        self.num_used_tokens = 0
        """What of them has really been used so far."""
        self.is_waiting = True

    @property
    def order(self) -> tuple[int, int]:
        """Tickets are served in this order, as far as is known here."""
        return self.priority, self._number

    def bring_prompts(self, num_tokens: int) -> None:
        """Say how many tokens the prompts have. Raises OverloadedError where that is too much just now."""
        self._room.check_tokens(num_tokens)
        self.num_prompt_tokens = num_tokens

    def check_deadline(self, seconds_left: float | None) -> None:
        """Raise OverloadedError where those in front will take longer than its client waits."""
        if seconds_left is not None:
            self._room.check_deadline(self, seconds_left)

    def start(self) -> None:
        """The engine has begun with it."""
        if self.is_waiting:
            self.is_waiting = False
            self.num_used_tokens += self.num_prompt_tokens
            self._room.note_start(self)


class WaitingRoom:
    """All requests that are being answered, and those of them that wait.

    Args:
        max_requests: most requests that may wait; None: no limit.
        max_tokens: most tokens that the prompts of those who wait may have together; None: no limit. A
            request that would wait alone is let in whatever it has.
        clock: seconds.
    """

    def __init__(
        self,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_refused = 0
        """Requests that weren't let in."""
        self._clock = clock
        self._tickets: dict[Ticket, None] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._num_entered = 0
        self._starts: deque[tuple[float, float]] = deque(maxlen=256)
        """When the engine began with somebody, and after how many seconds at the head of the queue."""

    @classmethod
    def of(cls, config: ServerConfig) -> WaitingRoom:
        """One with the limits that ``config`` has."""
        return cls(config.max_waiting_requests, config.max_waiting_tokens)

    def enter(self) -> Ticket:
        """Count one more. Raises OverloadedError where too many wait; always :meth:`leave` otherwise."""
        if self.max_requests is not None:
            num_waiting = sum(ticket.is_waiting for ticket in self._tickets)
            if num_waiting >= self.max_requests:
                self._refuse(
                    f"{num_waiting} requests are waiting, and at most {self.max_requests} may "
                    "(--max-waiting-requests)"
                )
        ticket = Ticket(self, self._num_entered, self._clock())
        self._num_entered += 1
        self._tickets[ticket] = None
        self._is_empty.clear()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Its answer has ended, one way or another."""
        del self._tickets[ticket]
        if not self._tickets:
            self._is_empty.set()

    @property
    def num_requests(self) -> int:
        """Those that are being answered, from their arrival to the end of their answers."""
        return len(self._tickets)

    async def wait_until_empty(self) -> None:
        """Return when none is left."""
        await self._is_empty.wait()

    def waiting(self) -> list[Ticket]:
        """Those whom the engine hasn't begun with, the next one first."""
        return sorted((ticket for ticket in self._tickets if ticket.is_waiting), key=lambda t: t.order)

    def check_tokens(self, num_tokens: int) -> None:
        """Raise OverloadedError unless so many tokens more may wait."""
        num_waiting_tokens = sum(t.num_prompt_tokens for t in self._tickets if t.is_waiting)
        limit = self.max_tokens
        if limit is not None and num_waiting_tokens > 0 and num_waiting_tokens + num_tokens > limit:
            self._refuse(
                f"prompts of {num_waiting_tokens} tokens are waiting, and with the {num_tokens} of this one "
                f"it would be more than {limit} (--max-waiting-tokens)"
            )

    def check_deadline(self, ticket: Ticket, seconds_left: float) -> None:
        """Raise OverloadedError where those in front of the ticket will take longer than that.

        Those of the same owner: whatever the order between owners, they are before it.
        """
        own = [other for other in self.waiting() if other.owner == ticket.owner]
        num_in_front = own.index(ticket)
        estimate = self.seconds_until_start(num_in_front)
        if estimate is not None and estimate > seconds_left:
            self._refuse(
                f"{num_in_front} of your requests are in front, which take about {estimate:.1f} s, and "
                f"the client waits {seconds_left:.1f} s (timeout)"
            )

    def note_start(self, ticket: Ticket) -> None:
        """The engine has begun with it."""
        now, previous = self._clock(), self._starts[-1][0] if self._starts else ticket.arrived
        self._starts.append((now, now - max(previous, ticket.arrived)))

    def find(self, id: str, owner: str) -> Ticket | None:
        """The owner's request of that id, if it is still being answered."""
        return next((t for t in self._tickets if id in t.ids and t.owner == owner), None)

    def seconds_until_start(self, position: int) -> float | None:
        """An estimate for the ``position``-th of those who wait; None where nothing has started lately.

        From how long each of the last minute's starts was the next one: while nobody waits, no time counts.
        """
        now = self._clock()
        while self._starts and self._starts[0][0] < now - _RATE_SECONDS:
            self._starts.popleft()
        if not self._starts:
            return None
        return position * sum(seconds for _, seconds in self._starts) / len(self._starts)

    def _refuse(self, reason: str) -> None:
        self.num_refused += 1
        estimate = self.seconds_until_start(1)
        retry_after = 1 if estimate is None else min(math.ceil(estimate), _LONGEST_RETRY)
        raise OverloadedError(f"{reason}; try again in {retry_after} s", retry_after=max(retry_after, 1))


class AdmissionMiddleware:
    """Gives each request that the engine must work for a ticket, as ``request.state.ticket``, or a 503.

    It stands behind the middleware that reads bodies: who sends one slowly takes nobody's place.
    """

    def __init__(self, app: ASGIApp, room: WaitingRoom, rate_limit: TokenRateLimit | None) -> None:
        self.app = app
        self.room = room
        self.rate_limit = rate_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection as ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in _COUNTED_PATHS:
            await self.app(scope, receive, send)
            return
        try:
            ticket = self.room.enter()
        except OverloadedError as error:
            record_of(scope).note_error(error)
            await error_response(error)(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["ticket"] = ticket
        ticket.owner = state.get("key_name", "")
        try:
            await self.app(scope, receive, send)
        finally:
            self.room.leave(ticket)
            if self.rate_limit is not None:
                self.rate_limit.give_back(ticket.owner, ticket.num_taken_tokens - ticket.num_used_tokens)
