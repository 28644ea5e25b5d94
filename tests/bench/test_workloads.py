"""What the workloads are said to be."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from minivllm_bench.workloads import WORKLOADS, Session, sharegpt_like


def first(name: str, seed: int, count: int = 200) -> list[Session]:
    return list(itertools.islice(WORKLOADS[name](random.Random(seed)), count))


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_sessions(name: str) -> None:
    sessions = first(name, 1)
    assert sessions == first(name, 1)
    for session in sessions:
        assert session.turns
        assert all(turn.prompt_tokens >= 1 and turn.output_tokens >= 1 for turn in session.turns)


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [("fixed", 100, 200), ("short-short", 32, 32), ("long-short", 1000, 50), ("long-long", 1000, 500)],
)
def test_fixed_lengths(name: str, prompt: int, output: int) -> None:
    for session in first(name, 0):
        assert [(turn.prompt_tokens, turn.output_tokens) for turn in session.turns] == [(prompt, output)]


def test_an_agent_takes_20_steps_and_a_chat_2_to_8() -> None:
    assert {len(session.turns) for session in first("agent", 0)} == {20}
    assert {len(session.turns) for session in first("chat", 0)} == set(range(2, 9))
    assert len({session.shared_prefix_tokens for session in first("shared-prefix", 0)}) == 1
    assert first("shared-prefix", 0, 1)[0].shared_prefix_tokens > 0


def test_lengths_are_lognormal() -> None:
    """Where nothing is cut off: the logarithms have a standard deviation of 1, and the means are right."""
    sessions = sharegpt_like(mean_prompt=1000, mean_output=5000, longest=10**9)(random.Random(0))
    turns = [session.turns[0] for session in itertools.islice(sessions, 20_000)]
    for lengths, mean in (([t.prompt_tokens for t in turns], 1000), ([t.output_tokens for t in turns], 5000)):
        logarithms = np.log(lengths)
        assert np.mean(lengths) == pytest.approx(mean, rel=0.05)  # five standard errors
        assert logarithms.std() == pytest.approx(1, rel=0.03)
        assert logarithms.mean() == pytest.approx(np.log(mean) - 0.5, abs=0.04)
    assert max(session.longest for session in first("sharegpt", 0, 5000)) <= 2048
