"""Loads that make no sense, and the statistics of arrivals."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from minivllm.errors import ConfigError
from minivllm_bench.load import Load, arrival_times


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_requests": 1}, "either --users (a closed loop) or --rate (an open loop)"),
        ({"users": 1, "rate": 1.0, "num_requests": 1}, "either --users"),
        ({"users": 1}, "--num-requests, --duration or both"),
        ({"users": 0, "num_requests": 1}, "--users must be at least 1, got 0"),
        ({"users": 1, "num_requests": 0}, "--num-requests must be at least 1, got 0"),
        ({"rate": 0.0, "num_requests": 1}, "--rate must be above 0, got 0"),
        ({"rate": float("nan"), "num_requests": 1}, "--rate must be above 0, got nan"),
        ({"rate": float("inf"), "num_requests": 1}, "--rate must be above 0, got inf"),
        ({"rate": 1.0, "burstiness": -1.0, "num_requests": 1}, "--burstiness must be above 0, got -1"),
        ({"users": 1, "duration": 0.0}, "--duration must be above 0, got 0"),
        ({"users": 1, "duration": 1.0, "drain": -1.0}, "--drain must be at least 0, got -1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Load(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0])
def test_gaps_have_the_mean_and_the_spread_that_were_asked_for(burstiness: float) -> None:
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k)."""
    count = 40_000
    times = np.array(list(itertools.islice(arrival_times(8.0, burstiness, random.Random(1)), count)))
    gaps = np.diff(times, prepend=0)
    variation = burstiness**-0.5
    error = 5 * variation / count**0.5  # five standard errors of the mean
    assert (gaps >= 0).all()
    assert gaps.mean() * 8 == pytest.approx(1, abs=error)
    assert gaps.std() * 8 == pytest.approx(variation, rel=0.1)


def test_poisson_counts() -> None:
    """With burstiness 1 the number of arrivals in a second is Poisson: its variance is its mean."""
    times = itertools.takewhile(lambda time: time < 10_000, arrival_times(3.0, 1.0, random.Random(2)))
    counts = np.bincount(np.array(list(times), dtype=int), minlength=10_000)
    assert counts.mean() == pytest.approx(3, abs=0.09)  # five standard errors
    assert counts.var() == pytest.approx(3, rel=0.08)
    assert (counts == 0).mean() == pytest.approx(np.exp(-3), abs=0.012)


def test_the_same_seed_arrives_at_the_same_times() -> None:
    def first(seed: int) -> list[float]:
        return list(itertools.islice(arrival_times(2.0, 0.5, random.Random(seed)), 50))

    assert first(1) == first(1) != first(2)
