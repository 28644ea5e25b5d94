"""Where a curve of throughput over users bends, and where one curve overtakes another."""

from __future__ import annotations

import math
from collections.abc import Mapping

Curve = Mapping[int, float]
"""Tokens per second of all users together, by the number of users."""

GROWTH = 0.10
"""More users pay while each doubling of their number adds at least this share to the throughput."""

LEAD = 0.05
"""A curve is ahead of another where it is this share above it: less is noise."""


def knee(curve: Curve) -> int | None:
    """The number of users from which more of them hardly add throughput.

    The least measured count after which, to each larger one, throughput grows by less than :data:`GROWTH` per
    doubling. Looking at all larger counts keeps one noisy point from passing for the knee.

    Returns:
        None where throughput grows up to the last count, or fewer than two were measured.
    """
    counts = sorted(curve)
    for place, users in enumerate(counts[:-1]):
        if not any(_pays(curve, users, more) for more in counts[place + 1 :]):
            return users
    return None


def _pays(curve: Curve, users: int, more: int) -> bool:
    if curve[users] <= 0 or curve[more] <= 0:
        return curve[more] > curve[users]
    doublings = math.log2(more / users)
    return math.log(curve[more] / curve[users]) >= doublings * math.log(1 + GROWTH)


def crossing(curve: Curve, other: Curve) -> float | None:
    """The number of users from which ``curve`` stays at least :data:`LEAD` above ``other``.

    Between the last count where it isn't and the next one, the ratio of the two is interpolated: its
    logarithm is taken to be linear in the logarithm of the users.

    Returns:
        The least count that both have where it is ahead from there on; None where it isn't at the largest.
    """
    counts = sorted(users for users in curve.keys() & other.keys() if curve[users] > 0 and other[users] > 0)
    leads = [math.log(curve[users] / other[users] / (1 + LEAD)) for users in counts]
    if not leads or leads[-1] < 0:
        return None
    behind = max((place for place, lead in enumerate(leads) if lead < 0), default=None)
    if behind is None:
        return float(counts[0])
    low, high = math.log(counts[behind]), math.log(counts[behind + 1])
    share = -leads[behind] / (leads[behind + 1] - leads[behind])
    return math.exp(low + (high - low) * share)
