"""How long a client waits for its answer: the field ``timeout``, or the header ``X-Request-Timeout``."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from minivllm.errors import DeadlineError, InvalidRequestError

HEADER = "X-Request-Timeout"
LONGEST = 86400.0


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of ``time.monotonic()`` after which an answer is of no use; infinity: there is none."""

    moment: float

    @classmethod
    def of(cls, timeout: float | None, headers: Mapping[str, str]) -> Deadline:
        """From now, ``timeout`` seconds or the header's, whichever are fewer.

        Raises:
            InvalidRequestError: the header is no such number.
        """
        seconds = math.inf if timeout is None else timeout
        given = headers.get(HEADER)
        if given is not None:
            if re.fullmatch(r"\d{1,6}(\.\d{1,9})?", given) is None or not 0 < float(given) <= LONGEST:
                raise InvalidRequestError(
                    f"{HEADER} must be seconds, more than 0 and at most {LONGEST:g}, got {given[:80]!r}"
                )
            seconds = min(seconds, float(given))
        return cls(time.monotonic() + seconds)

    def seconds_left(self) -> float | None:
        """At least 0; None without an end."""
        return None if math.isinf(self.moment) else max(self.moment - time.monotonic(), 0.0)

    @contextlib.asynccontextmanager
    async def holds(self) -> AsyncIterator[None]:
        """What is awaited in here is given up when the moment comes. What runs in a thread goes on in it.

        Raises:
            DeadlineError: it came.
        """
        limit = asyncio.timeout(self.seconds_left())
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineError("the timeout that the request gave passed before the engine got it") from None
