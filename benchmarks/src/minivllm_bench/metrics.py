"""From records to figures, by the field's definitions.

A run that ends while requests still wait knows only that they waited at least so long. Such a request
counts as infinitely slow: a percentile that falls among them is null (JSON has no infinity), which reads
"longer than the run", and so is a mean of which one is part. Leaving them out would make the slowest server
look fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minivllm_bench.records import RequestRecord

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Goals:
    """Limits, in seconds, that a request must keep to count for goodput; None: no limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def are_met_by(self, record: RequestRecord) -> bool:
        """Whether a record is complete and within all limits."""
        if not record.is_complete:
            return False
        pairs = ((self.ttft, record.ttft), (self.tpot, record.tpot), (self.e2e, record.e2e))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks; infinite where either is. NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low, share = int(position), position % 1
    if share == 0:
        return ordered[low]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * share


def distribution(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and percentiles. None where there are no values, or where they are infinite."""
    known = list(values)
    figures = {"mean": math.fsum(known) / len(known) if known else math.nan}
    figures |= {f"p{percent}": percentile(known, percent) for percent in PERCENTILES}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def summarise(records: Sequence[RequestRecord], seconds: float, goals: Goals | None = None) -> dict[str, Any]:
    """The figures of a run.

    Args:
        records: all requests of the run.
        seconds: how long it lasted; tokens and answers that came later don't count in throughputs.
        goals: what counts for goodput.

    Returns:
        JSON: counts, throughputs per second, and distributions of ``ttft``, ``tpot``, ``itl`` and ``e2e``
        in seconds. ``ttft`` and ``e2e`` count requests without a first token, or without an end, as
        infinitely slow; failed ones count in ``failed`` alone.
    """
    complete = [record for record in records if record.is_complete]
    failed = [record for record in records if record.error is not None]
    alive = [record for record in records if record.error is None]
    output = math.fsum(output_tokens_until(record, seconds) for record in records)
    prompts = sum(record.prompt_tokens for record in alive if _is_before(record.first_token, seconds))
    in_time = [record for record in complete if _is_before(record.finished, seconds)]
    return {
        "seconds": seconds,
        "requests": len(records),
        "completed": len(complete),
        "failed": len(failed),
        "unfinished": len(alive) - len(complete),
        "errors": _most_common(record.error for record in failed if record.error),
        "prompt_tokens": prompts,
        "cached_tokens": sum(record.cached_tokens for record in alive),
        "output_tokens": output,
        "request_throughput": len(in_time) / seconds,
        "output_throughput": output / seconds,
        "total_throughput": (prompts + output) / seconds,
        "goodput": None if goals is None else sum(map(goals.are_met_by, in_time)) / seconds,
        "goals": None if goals is None else asdict(goals),
        # Of an answer without any text, such as an end token alone, nobody knows when the first token came.
        "ttft": distribution(
            math.inf if record.ttft is None else record.ttft
            for record in alive
            if record.chunk_times or not record.is_complete
        ),
        "tpot": distribution(record.tpot for record in complete if record.tpot is not None),
        "itl": distribution(gap for record in alive for gap in record.inter_token_latencies),
        "e2e": distribution(math.inf if record.e2e is None else record.e2e for record in alive),
    }


def _is_before(time: float | None, end: float) -> bool:
    return time is not None and time <= end


def output_tokens_until(record: RequestRecord, seconds: float) -> float:
    """Tokens that had arrived by then; where chunks have several, each counts for its share."""
    if not record.chunk_times:
        return 0.0
    in_time = sum(time <= seconds for time in record.chunk_times)
    return max(record.output_tokens, len(record.chunk_times)) * in_time / len(record.chunk_times)


def _most_common(errors: Iterable[str], most: int = 5) -> dict[str, int]:
    counts: dict[str, int] = {}
    for error in errors:
        counts[error] = counts.get(error, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:most])
