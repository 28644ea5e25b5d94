"""One point of a sweep: what a server does while a fixed number of users keeps it busy.

All users start at once, which no real ones do, so the first seconds only warm the server up; what counts is
the window after them. Answers of memoryless lengths (:func:`minivllm_bench.workloads.memoryless`) end, and
new prompts come, at the same rate from the start: the window needs no whole rounds to have its share of both.

Many requests have no first token yet when a window ends. Leaving them out would make the slowest server look
fast, and counting them as infinitely slow would punish the fast one for a request sent at the last moment. So
percentiles of waiting times are those of the product-limit estimator (Kaplan and Meier, 1958), which takes
from such a request what it says: that it waited at least so long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

from minivllm_bench.metrics import distribution, output_tokens_until, summarise
from minivllm_bench.records import RequestRecord


class Waits(TypedDict):
    """Seconds that requests waited for something."""

    p50: float | None
    """None: longer than ``longest``."""
    p90: float | None
    p99: float | None
    longest: float | None
    """That anyone waited, or was still waiting at the end; None where there were no requests."""
    observed: int
    """Requests whose wait ended."""
    waiting: int
    """Requests that were still waiting."""


def wait_percentile(observed: Sequence[float], waiting: Sequence[float], percent: float) -> float | None:
    """The least time within which ``percent`` of all waits have ended, or None where that isn't known.

    Args:
        observed: waits that ended, in seconds.
        waiting: how long those had waited that hadn't ended when one stopped looking.
    """
    at_risk = len(observed) + len(waiting)
    still_waiting = 1.0
    # Of equal times, ends come first: who stopped waiting then had waited that long, too.
    for seconds, is_end in sorted([(t, True) for t in observed] + [(t, False) for t in waiting], key=_order):
        if is_end:
            still_waiting *= 1 - 1 / at_risk
            if still_waiting <= 1 - percent / 100 + 1e-9:
                return seconds
        at_risk -= 1
    return None


def _order(entry: tuple[float, bool]) -> tuple[float, bool]:
    seconds, is_end = entry
    return seconds, not is_end


def waits(observed: Sequence[float], waiting: Sequence[float]) -> Waits:
    """Percentiles of waits, some of which hadn't ended."""
    return {
        "p50": wait_percentile(observed, waiting, 50),
        "p90": wait_percentile(observed, waiting, 90),
        "p99": wait_percentile(observed, waiting, 99),
        "longest": max([*observed, *waiting], default=None),
        "observed": len(observed),
        "waiting": len(waiting),
    }


class SteadyState(TypedDict):
    """What the window says."""

    window: tuple[float, float]
    """From and to, in seconds since the first request."""
    requests: int
    """In the whole run, the warm-up included; so for the next three."""
    completed: int
    failed: int
    errors: dict[str, int]
    output_throughput: float
    """Output tokens per second of all users together."""
    user_throughput: float
    """The same for one user, waiting included."""
    ttft: Waits
    """Time to first token, of requests that were sent in the window or still waited when it began; of all,
    where the window has none of either."""
    itl: dict[str, float | None]
    """Gaps between tokens that arrived in the window, seconds."""


def steady_state(records: Sequence[RequestRecord], users: int, start: float, end: float) -> SteadyState:
    """Figures of the window from ``start`` to ``end``, in seconds since the run began."""
    counts = summarise(records, end)
    alive = [record for record in records if record.error is None]
    tokens = sum(output_tokens_until(r, end) - output_tokens_until(r, start) for r in alive)
    throughput = tokens / (end - start)
    return {
        "window": (start, end),
        "requests": counts["requests"],
        "completed": counts["completed"],
        "failed": counts["failed"],
        "errors": counts["errors"],
        "output_throughput": throughput,
        "user_throughput": throughput / users,
        "ttft": _first_token_waits(alive, start, end),
        "itl": distribution(_gaps(alive, start, end)),
    }


def _first_token_waits(records: Sequence[RequestRecord], start: float, end: float) -> Waits:
    observed, waiting = [], []
    for record in records:
        first = record.first_token
        if first is not None and first <= end:
            if record.sent >= start or first > start:
                observed.append(first - record.sent)
        elif record.finished is None and record.sent <= end:
            waiting.append(end - record.sent)
    if not observed and not waiting and start > 0:
        return _first_token_waits(records, 0.0, end)
    return waits(observed, waiting)


def _gaps(records: Iterable[RequestRecord], start: float, end: float) -> list[float]:
    return [
        gap
        for record in records
        for gap, time in zip(record.inter_token_latencies, record.chunk_times[1:], strict=True)
        if start < time <= end
    ]
