"""Knees and crossings of curves that are known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm_bench.knee import GROWTH, LEAD, crossing, knee

USERS = (1, 2, 4, 8, 16, 32, 50, 64, 128)


@pytest.mark.parametrize("slots", USERS)
def test_a_curve_that_grows_up_to_its_slots_bends_there(slots: int) -> None:
    curve = {users: 80.0 * min(users, slots) for users in USERS}
    assert knee(curve) == (slots if slots < USERS[-1] else None)


def test_growth_is_per_doubling() -> None:
    """50 and 64 users are a third of a doubling apart: 4% there is more than 10% per doubling."""
    assert knee({50: 100.0, 64: 104.0}) is None
    assert knee({50: 100.0, 64: 103.0}) == 50
    assert knee({50: 100.0, 100: 109.9}) == 50
    assert knee({50: 100.0, 100: 110.1}) is None


def test_one_noisy_point_is_no_knee() -> None:
    assert knee({1: 80.0, 2: 150.0, 4: 148.0, 8: 290.0, 16: 560.0, 32: 565.0, 64: 560.0}) == 16


def test_a_curve_that_falls_bends_at_its_top() -> None:
    assert knee({1: 100.0, 2: 190.0, 4: 150.0, 8: 60.0}) == 2


@pytest.mark.parametrize("curve", [{}, {8: 100.0}])
def test_a_knee_needs_two_points(curve: dict[int, float]) -> None:
    assert knee(curve) is None


@given(
    st.dictionaries(st.integers(1, 500), st.floats(0.1, 1e4), min_size=2, max_size=9),
)
def test_a_knee_is_the_first_from_which_nothing_more_pays(curve: dict[int, float]) -> None:
    def pays(users: int) -> bool:
        """By the definition, with powers where the code has roots."""
        return any(
            curve[more] >= curve[users] * (1 + GROWTH) ** math.log2(more / users)
            for more in curve
            if more > users
        )

    found = knee(curve)
    flat = [users for users in sorted(curve)[:-1] if not pays(users)]
    assert found == (flat[0] if flat else None)


def test_a_crossing_is_where_the_lead_begins() -> None:
    """Both are powers of the users, so that interpolation is exact: they part as users ** 0.5."""
    curve = {users: 100.0 * users**0.5 for users in USERS}
    flat = dict.fromkeys(USERS, 200.0)
    expected = (2 * (1 + LEAD)) ** 2
    assert crossing(curve, flat) == pytest.approx(expected)
    assert crossing(flat, curve) is None


def test_ahead_everywhere_is_ahead_from_the_first_count() -> None:
    assert crossing({2: 30.0, 4: 60.0}, {2: 10.0, 4: 10.0}) == 2.0


def test_a_lead_that_is_lost_again_does_not_count() -> None:
    curve, other = {1: 90.0, 2: 10.0, 4: 50.0, 8: 100.0}, {1: 50.0, 2: 50.0, 4: 50.0, 8: 50.0}
    found = crossing(curve, other)
    assert found is not None
    assert 4 < found < 8


def test_noise_is_no_lead() -> None:
    assert crossing({1: 101.0, 2: 104.0}, {1: 100.0, 2: 100.0}) is None


def test_only_counts_that_both_have_are_compared() -> None:
    assert crossing({1: 10.0, 64: 900.0, 128: 900.0}, {1: 20.0, 2: 20.0, 64: 100.0}) == pytest.approx(
        crossing({1: 10.0, 64: 900.0}, {1: 20.0, 64: 100.0})
    )
    assert crossing({1: 10.0}, {2: 5.0}) is None
    assert crossing({1: 10.0, 2: 10.0}, {1: 5.0, 2: 0.0}) == 1.0
