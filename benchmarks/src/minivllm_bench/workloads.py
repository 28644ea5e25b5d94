"""What users ask for: sessions of one or more turns, as lengths in tokens.

A workload is a stream of sessions, the same for the same seed, and endless where it has a name. Who turns
lengths into prompts (words for an HTTP server, token ids for a simulation) must see to it that prompts of
different sessions differ from their first token on, but for the shared prefix, and that each turn of a
session begins with all that came before in it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    prompt_tokens: int
    """What it adds to all that came before in the session."""
    output_tokens: int
    """Asked for; the end of a turn is ignored, so that each answer has exactly so many."""
    text: str | None = None
    """What it adds, word for word; ``prompt_tokens`` is an estimate then. None: any text of that length."""


@dataclass(frozen=True, slots=True)
class Session:
    """What one user does: one turn after the other."""

    turns: tuple[Turn, ...]
    shared_prefix_tokens: int = 0
    """At the start of every session of the workload, the same tokens: a system prompt."""

    @property
    def longest(self) -> int:
        """Tokens of the last turn's prompt and answer together."""
        return self.shared_prefix_tokens + sum(t.prompt_tokens + t.output_tokens for t in self.turns)


Sessions = Iterator[Session]
Workload = Callable[[random.Random], Sessions]


def fixed(prompt_tokens: int, output_tokens: int) -> Workload:
    """Every request alike."""

    def sessions(rng: random.Random) -> Sessions:
        while True:
            yield Session((Turn(prompt_tokens, output_tokens),))

    return sessions


def sharegpt_like(*, mean_prompt: float, mean_output: float, longest: int) -> Workload:
    """Lengths of one-turn chats: independent lognormals with a long tail, cut off at ``longest`` in all.

    Means of ShareGPT in Kwon et al. 2023, Figure 11: prompts of 161.31 tokens, outputs of 337.99. A sigma of
    1 gives its shape roughly: half of the requests are shorter than 0.6 of the mean, 1% longer than 6 times.
    """
    sigma = 1.0

    def sessions(rng: random.Random) -> Sessions:
        def length(mean: float) -> int:
            return max(4, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))

        while True:
            prompt = min(length(mean_prompt), longest // 2)
            yield Session((Turn(prompt, min(length(mean_output), longest - prompt)),))

    return sessions


def memoryless(mean_prompt: int, mean_output: int, longest: int) -> Workload:
    """One-turn chats whose answers are as likely to end at one token as at any other.

    So many users then end answers, and send prompts, at the same rate at any time, also right after they have
    all begun at once. Answers are exponentially distributed and cut off at ``longest``; prompts are uniform
    from half to one and a half times their mean.
    """

    def sessions(rng: random.Random) -> Sessions:
        while True:
            prompt = rng.randint(mean_prompt // 2, mean_prompt * 3 // 2)
            output = min(longest, 2 + int(rng.expovariate(1 / (mean_output - 2))))
            yield Session((Turn(prompt, output),))

    return sessions


def growing_chat(sessions_turns: tuple[int, int] = (2, 8)) -> Workload:
    """A chat whose history grows: each turn sends all that was said before."""

    def sessions(rng: random.Random) -> Sessions:
        while True:
            count = rng.randint(*sessions_turns)
            yield Session(tuple(Turn(rng.randint(20, 80), rng.randint(30, 120)) for _ in range(count)))

    return sessions


def shared_prefix(prefix_tokens: int = 512) -> Workload:
    """Short requests behind one long system prompt."""

    def sessions(rng: random.Random) -> Sessions:
        while True:
            yield Session((Turn(rng.randint(16, 64), 64),), shared_prefix_tokens=prefix_tokens)

    return sessions


def agent(num_steps: int = 20) -> Workload:
    """An agent's loop: a system prompt, then steps of a short call and a longer result that comes back."""

    def sessions(rng: random.Random) -> Sessions:
        while True:
            steps = tuple(Turn(100 if step == 0 else rng.randint(40, 100), 32) for step in range(num_steps))
            yield Session(steps, shared_prefix_tokens=256)

    return sessions


WORKLOADS: dict[str, Workload] = {
    "fixed": fixed(100, 200),
    "short-short": fixed(32, 32),
    "long-short": fixed(1000, 50),
    "long-long": fixed(1000, 500),
    "memoryless": memoryless(64, 192, 768),
    "chat": growing_chat(),
    "shared-prefix": shared_prefix(),
    "agent": agent(),
    "sharegpt": sharegpt_like(mean_prompt=161.31, mean_output=337.99, longest=2048),
}
"""By the names that ``--workload`` takes."""
