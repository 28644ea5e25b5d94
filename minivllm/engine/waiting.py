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
        self._queues: dict[str, deque[Request]] = {}
        """By owner, of those who wait for the first time, and none of them empty. Here all have one."""

    def __len__(self) -> int:
        return sum(map(len, (self._evicted, *self._queues.values())))

    def __iter__(self) -> Iterator[Request]:
        return chain(self._evicted, *self._queues.values())

    def add(self, request: Request) -> None:
        """A new request, behind those of its owner and priority."""
        queue = self._queues.setdefault(self._owner(request), deque())
        position = len(queue)
        while position > 0 and queue[position - 1].terms.priority > request.terms.priority:
            position -= 1
        queue.insert(position, request)

    def add_evicted(self, request: Request) -> None:
        """A request that ran until now, before all others."""
        self._evicted.appendleft(request)

    def first(self) -> Request:
        """Who is next. There must be one."""
        return self._evicted[0] if self._evicted else self._first_new()

    def remove(self, request: Request) -> None:
        """It waits no longer."""
        if request in self._evicted:
            self._evicted.remove(request)
            return
        queue = self._queues[self._owner(request)]
        queue.remove(request)
        if not queue:
            del self._queues[self._owner(request)]

    def charge_prompt(self, request: Request) -> None:
        """Note that a request was admitted for the first time: its prompt is computed. Here nobody counts."""

    def charge_outputs(self, requests: Iterable[Request]) -> None:
        """Note that each of these got a token. Here nobody counts."""

    def _owner(self, request: Request) -> str:
        return ""

    def _first_new(self) -> Request:
        (queue,) = self._queues.values()
        return queue[0]


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
        tenant = request.terms.tenant
        if tenant not in self._queues:
            floor = 0
            if self._queues:
                floor = min(self._served[active] for active in self._queues)
            elif self._last_left is not None:
                floor = self._served[self._last_left]
            self._served[tenant] = max(self._served.get(tenant, 0), floor)
        super().add(request)

    def remove(self, request: Request) -> None:
        """See :meth:`WaitingQueue.remove`."""
        super().remove(request)
        self._last_left = request.terms.tenant

    def charge_prompt(self, request: Request) -> None:
        """See :meth:`WaitingQueue.charge_prompt`. What was in the prefix cache is free."""
        self._served[request.terms.tenant] += self.PROMPT_WEIGHT * request.num_uncomputed_tokens

    def charge_outputs(self, requests: Iterable[Request]) -> None:
        """See :meth:`WaitingQueue.charge_outputs`."""
        for request in requests:
            self._served[request.terms.tenant] += self.OUTPUT_WEIGHT

    def _owner(self, request: Request) -> str:
        return request.terms.tenant

    def _first_new(self) -> Request:
        heads = (queue[0] for queue in self._queues.values())
        return min(heads, key=lambda head: (head.terms.priority, self._served[head.terms.tenant]))
