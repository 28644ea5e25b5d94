"""What a load generator, or a simulation, writes down about each request."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestRecord:
    """One request as its sender saw it. All times are seconds since the run began."""

    session: int
    """Number of the session that it belongs to, from 0."""
    turn: int
    """Its place in that session, from 0."""
    sent: float
    """When it was sent; with an open loop, when it should have been."""
    prompt_tokens: int
    """As the server counted them; as the workload asked for until it has."""
    output_tokens: int = 0
    """As the server counted them; chunks with text where it doesn't say."""
    cached_tokens: int = 0
    """Tokens of the prompt that the server says it found in its prefix cache."""
    chunk_times: list[float] = field(default_factory=list)
    """When each chunk with text arrived: of most servers, each token."""
    finished: float | None = None
    """When the answer was complete, or had failed; None where the run ended first."""
    error: str | None = None
    """Why it failed."""
    status: int | None = None
    """HTTP status, where there was an answer."""

    def as_json(self) -> dict[str, object]:
        """All of it; times to the hundredth of a millisecond."""
        return {
            "session": self.session,
            "turn": self.turn,
            "sent": round(self.sent, 5),
            "finished": None if self.finished is None else round(self.finished, 5),
            "status": self.status,
            "error": self.error,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "chunk_times": [round(time, 5) for time in self.chunk_times],
        }

    @property
    def is_complete(self) -> bool:
        """Whether it was answered in full."""
        return self.finished is not None and self.error is None

    @property
    def first_token(self) -> float | None:
        """When the first chunk with text came."""
        return self.chunk_times[0] if self.chunk_times else None

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds: from sending to the first chunk with text."""
        return self.chunk_times[0] - self.sent if self.chunk_times else None

    @property
    def e2e(self) -> float | None:
        """End-to-end latency, seconds, of a complete request."""
        return self.finished - self.sent if self.finished is not None and self.error is None else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, seconds: (latency - TTFT) / (tokens - 1)."""
        if self.e2e is None or self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Gaps between chunks, seconds."""
        return [later - earlier for earlier, later in itertools.pairwise(self.chunk_times)]
