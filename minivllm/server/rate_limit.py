"""How many tokens each API key gets in a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from minivllm.errors import RateLimitError


class TokenRateLimit:
    """A token bucket for each key (Turner 1986's leaky bucket, seen from the other side).

    A bucket holds a minute's tokens and fills up evenly. A request takes its prompt and the most that it may
    generate, and gives back what it didn't; one that asks for more than a full bucket holds takes all of it,
    so that it isn't refused for ever.
    """

    def __init__(self, tokens_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens_per_minute = tokens_per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens at a moment, and the moment

    def take(self, key: str, num_tokens: int) -> int:
        """Take a request's tokens; how many were taken.

        Raises:
            RateLimitError: there aren't enough; it says when there will be.
        """
        num_tokens = min(num_tokens, self.tokens_per_minute)
        left = self._left(key)
        if left < num_tokens - 1e-6:  # rounding must not refuse who comes back when told to
            seconds = math.ceil((num_tokens - left) * 60 / self.tokens_per_minute)
            raise RateLimitError(
                f"this API key may use {self.tokens_per_minute} tokens a minute, prompts and answers "
                f"together (--key-tokens-per-minute): {max(int(left), 0)} are left, and this request may "
                f"take {num_tokens}; try again in {seconds} s",
                retry_after=seconds,
            )
        self._buckets[key] = left - num_tokens, self._clock()
        return num_tokens

    def give_back(self, key: str, num_tokens: int) -> None:
        """Return what a request took and didn't use; a negative number takes what it used beyond that."""
        self._buckets[key] = min(self._left(key) + num_tokens, self.tokens_per_minute), self._clock()

    def _left(self, key: str) -> float:
        now = self._clock()
        tokens, then = self._buckets.get(key, (float(self.tokens_per_minute), now))
        return min(tokens + (now - then) * self.tokens_per_minute / 60, self.tokens_per_minute)
