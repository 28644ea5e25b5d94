"""Figures against numbers worked out by hand, and against numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm_bench.metrics import Goals, distribution, percentile, summarise
from minivllm_bench.records import RequestRecord

LATENCIES = ("ttft", "tpot", "itl", "e2e")


def record(sent: float, *chunks: float, end: float | None = None, **fields: object) -> RequestRecord:
    """Ended with its last chunk, or at ``end``; a token in each chunk."""
    made = RequestRecord(0, 0, sent, 10, output_tokens=len(chunks), chunk_times=list(chunks))
    made.finished = end if end is not None else chunks[-1] if chunks else None
    for name, value in fields.items():
        setattr(made, name, value)
    return made


finite = st.floats(0, 1e6)


@given(st.lists(finite, min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


@given(st.lists(finite, min_size=1), st.integers(1, 10))
def test_what_never_ended_is_slower_than_all_else(values: list[float], num_infinite: int) -> None:
    """numpy's percentiles with a number above all others in place of infinity."""
    figures = distribution(values + [math.inf] * num_infinite)
    huge = 1e30
    assert figures["mean"] is None
    for percent in (50, 90, 99):
        expected = np.percentile(values + [huge] * num_infinite, percent)
        if expected > huge * 1e-9:  # some of the huge number is in it, by more than rounding
            assert figures[f"p{percent}"] is None
        elif expected < 2e6:
            assert figures[f"p{percent}"] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_no_values() -> None:
    assert distribution([]) == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_figures_by_hand() -> None:
    """Two requests: tokens at 1, 2, 4 and at 3, 3.5; sent at 0 and 1."""
    summary = summarise([record(0, 1, 2, 4), record(1, 3, 3.5)], seconds=4)
    assert summary["ttft"]["mean"] == 1.5  # 1 and 2
    assert summary["tpot"]["mean"] == 1  # 3 / 2 and 0.5 / 1
    assert summary["itl"]["mean"] == pytest.approx(3.5 / 3)  # 1, 2 and 0.5, pooled: not the mean of means
    assert summary["itl"]["p50"] == 1
    assert summary["e2e"]["mean"] == 3.25  # 4 and 2.5
    assert (summary["completed"], summary["failed"], summary["unfinished"]) == (2, 0, 0)
    assert summary["request_throughput"] == 0.5
    assert summary["output_throughput"] == 5 / 4
    assert summary["total_throughput"] == 25 / 4


def test_tpot_is_of_tokens_and_itl_of_chunks() -> None:
    """Seven tokens in three chunks: speculative decoding, say."""
    summary = summarise([record(0, 1, 3, 4, output_tokens=7)], seconds=4)
    assert summary["tpot"]["mean"] == 0.5  # (4 - 1) / (7 - 1)
    assert summary["itl"]["mean"] == 1.5
    assert summary["output_tokens"] == 7


def test_one_token_has_no_tpot() -> None:
    summary = summarise([record(0, 1)], seconds=1)
    assert summary["tpot"]["mean"] is None
    assert summary["ttft"]["mean"] == summary["e2e"]["mean"] == 1


def test_failed_requests_count_as_failed_alone() -> None:
    failed = record(0, 1, 2, end=2, error="HTTP 500: no")
    refused = record(0, end=0.1, error="HTTP 429: too many")
    again = record(0, end=0.1, error="HTTP 429: too many")
    summary = summarise([record(0, 1, 2), failed, refused, again], seconds=4, goals=Goals(ttft=5))
    assert (summary["completed"], summary["failed"], summary["unfinished"]) == (1, 3, 0)
    assert summary["errors"] == {"HTTP 429: too many": 2, "HTTP 500: no": 1}
    assert summary["e2e"]["p99"] == 2
    assert summary["ttft"]["p99"] == 1
    assert summary["prompt_tokens"] == 10
    assert summary["goodput"] == summary["request_throughput"] == 0.25


def test_unfinished_requests_make_it_slower() -> None:
    """One answered, one under way, one still waiting for its first token."""
    under_way = record(1, 2, 3, finished=None)
    waiting = record(2)
    summary = summarise([record(0, 1, 2), under_way, waiting], seconds=4)
    assert (summary["completed"], summary["unfinished"]) == (1, 2)
    assert summary["ttft"] == {"mean": None, "p50": 1, "p90": None, "p99": None}
    assert summary["e2e"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert summary["itl"]["mean"] == 1
    assert summary["output_tokens"] == 4


def test_what_came_after_the_run_has_no_throughput() -> None:
    """It ends at 4: half of the second answer's four tokens, and none of the third's, had come by then."""
    late = record(3, 3.5, 4, 5, 6, output_tokens=8)
    later = record(3.9, 4.5, 5)
    summary = summarise([record(0, 1, 2), late, later], seconds=4, goals=Goals())
    assert summary["completed"] == 3
    assert summary["request_throughput"] == summary["goodput"] == 0.25
    assert summary["output_tokens"] == 2 + 4
    assert summary["prompt_tokens"] == 20
    assert summary["e2e"]["p50"] == 2  # but its latency is known: 2, 3 and 1.1


def test_an_answer_without_text_has_no_first_token() -> None:
    summary = summarise([record(0, 1, 2), record(0, end=3, output_tokens=1)], seconds=3)
    assert summary["ttft"]["mean"] == 1
    assert summary["e2e"]["mean"] == 2.5


@pytest.mark.parametrize(
    ("goals", "count"),
    [
        (Goals(), 2),
        (Goals(ttft=1), 1),
        (Goals(ttft=0.99), 0),
        (Goals(tpot=1.5), 2),
        (Goals(tpot=1), 1),
        (Goals(e2e=4), 2),
        (Goals(e2e=3), 1),
        (Goals(ttft=1, e2e=3), 0),
        (Goals(ttft=2, tpot=1.5, e2e=4), 2),
    ],
)
def test_goodput_counts_what_keeps_all_limits(goals: Goals, count: int) -> None:
    """Time to first token 1 and 2, per token 1.5 and 0.5, in all 4 and 2.5."""
    requests = [record(0, 1, 2, 4), record(1, 3, 3.5), record(0), record(0, end=0.1, error="no")]
    assert summarise(requests, 10, goals)["goodput"] == count / 10


@st.composite
def records(draw: st.DrawFn) -> RequestRecord:
    sent = draw(st.floats(0, 50))
    gaps = draw(st.lists(st.floats(0, 5), max_size=6))
    times = [sent + float(total) for total in np.cumsum(gaps)]
    made = record(sent, *times)
    if draw(st.booleans()) and times:
        made.finished = None
    elif draw(st.booleans()):
        made.finished, made.error = sent + 60, draw(st.sampled_from(["a", "b"]))
    return made


@given(st.lists(records(), max_size=12), st.floats(1, 100))
def test_figures_are_json_and_hang_together(run: list[RequestRecord], seconds: float) -> None:
    summary = summarise(run, seconds, Goals(ttft=1, e2e=5))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["completed"] + summary["failed"] + summary["unfinished"] == len(run)
    assert sum(summary["errors"].values()) == summary["failed"]
    assert 0 <= summary["goodput"] <= summary["request_throughput"]
    assert summary["output_tokens"] == pytest.approx(
        sum(time <= seconds for one in run for time in one.chunk_times)
    )
    for name in LATENCIES:
        known = [value for key, value in summary[name].items() if key != "mean" and value is not None]
        assert known == sorted(known)
    alive = [one for one in run if one.error is None]
    if alive and all(one.is_complete for one in alive):
        e2e = [one.e2e for one in alive]
        assert summary["e2e"]["p90"] == pytest.approx(np.percentile(e2e, 90), rel=1e-9, abs=1e-9)
        assert summary["e2e"]["mean"] == pytest.approx(np.mean(e2e), rel=1e-9, abs=1e-9)
