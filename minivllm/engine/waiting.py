"""Who waits, and who of them is next. Two orders behind one interface, chosen once, in ``Engine.__init__``.

Evicted requests come first in both: they were running, and what they have is computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

from minivllm.request import Request


class WaitingQueue:
    """First come, first served among requests of one ``priority``; the lowest number first."""

    def __init__(self) -> None:
        self._evicted: deque[Request] = deque()
        self._queue: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._evicted) + len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return chain(self._evicted, self._queue)

    def add(self, request: Request) -> None:
        """A new request, behind those of its priority."""
        position = len(self._queue)
        while position > 0 and self._queue[position - 1].priority > request.priority:
            position -= 1
        self._queue.insert(position, request)

    def add_evicted(self, request: Request) -> None:
        """A request that ran until now, before all others."""
        self._evicted.appendleft(request)

    def first(self) -> Request:
        """Who is next. There must be one."""
        return self._evicted[0] if self._evicted else self._first_new()

    def remove(self, request: Request) -> None:
        """It waits no longer."""
        (self._evicted if request in self._evicted else self._queue).remove(request)

    def charge_prompt(self, request: Request) -> None:
        """Note that a request was admitted for the first time: its prompt is computed. Here nobody counts."""

    def charge_outputs(self, requests: Iterable[Request]) -> None:
        """Note that each of these got a token. Here nobody counts."""

    def _first_new(self) -> Request:
        return self._queue[0]


class FairQueue(WaitingQueue):
    """Of the tenants who wait, the one who has been served least is next.

    The virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models", Algorithm 2:
    a tenant's counter grows by what it gets, and who comes back from a pause is lifted to the least of those
    who are waiting, so that idling earns no credit. ``priority`` comes before fairness; a tenant's own
    requests are first come, first served.
    """

    PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # the paper's: an output token costs about as much as two of a prompt

    def __init__(self) -> None:
        super().__init__()
        self._served: dict[str, int] = {}
        self._last_left: str | None = None

    def add(self, request: Request) -> None:
        """See :meth:`WaitingQueue.add`."""
        active = {other.tenant for other in self._queue}
        if request.tenant not in active:
            floor = 0
            if active:
                floor = min(self._served[tenant] for tenant in active)
            elif self._last_left is not None:
                floor = self._served[self._last_left]
            self._served[request.tenant] = max(self._served.get(request.tenant, 0), floor)
        super().add(request)

    def remove(self, request: Request) -> None:
        """See :meth:`WaitingQueue.remove`."""
        super().remove(request)
        self._last_left = request.tenant

    def charge_prompt(self, request: Request) -> None:
        """See :meth:`WaitingQueue.charge_prompt`. What was in the prefix cache is free."""
        self._served[request.tenant] += self.PROMPT_WEIGHT * request.num_uncomputed_tokens

    def charge_outputs(self, requests: Iterable[Request]) -> None:
        """See :meth:`WaitingQueue.charge_outputs`."""
        for request in requests:
            self._served[request.tenant] += self.OUTPUT_WEIGHT

    def _first_new(self) -> Request:
        heads: dict[str, Request] = {}
        for request in self._queue:
            if request.priority > self._queue[0].priority:
                break
            heads.setdefault(request.tenant, request)
        return min(heads.values(), key=lambda request: self._served[request.tenant])
