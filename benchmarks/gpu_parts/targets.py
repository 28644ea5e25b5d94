"""What the project wants of a data-centre GPU, and what a run reached of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_parts.setting import Row

MIN_BATCH, MIN_CONTEXT = 16, 2048
"""From here on decode attention has enough to read to be measured against the bandwidth."""


def targets(results: dict[str, Any]) -> list[Row]:
    """Each target: what is wanted, what was measured (None: it wasn't), and whether that is enough."""
    rows = []
    for name, wanted, unit, measured in _measured(results):
        is_most = name.startswith("idle")
        is_reached = None
        if measured is not None:
            is_reached = measured < wanted if is_most else measured >= wanted
        rows.append(
            {"target": name, "wanted": wanted, "unit": unit, "measured": measured, "is_reached": is_reached}
        )
    return rows


def lines(rows: list[Row]) -> list[str]:
    """The targets as a table."""
    text = [f"{'target':<58} {'wanted':>10} {'measured':>10}"]
    for row in rows:
        wanted = _format(row["wanted"], row["unit"])
        wanted = ("< " if row["target"].startswith("idle") else "") + wanted
        measured = "-" if row["measured"] is None else _format(row["measured"], row["unit"])
        verdict = {None: "not measured", True: "reached", False: "not reached"}[row["is_reached"]]
        text.append(f"{row['target']:<58} {wanted:>10} {measured:>10}   {verdict}")
    return text


def _format(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{value:.1f} x" if unit == "x" else f"{value:,.0f}"


def _measured(results: dict[str, Any]) -> Iterator[tuple[str, float, str, float | None]]:
    """(Target, wanted, unit, measured). Where a target is about several cases, the worst counts."""
    steps = {(row["users"], row["context"]): row for row in _rows(results, "decode", "steps")}
    first_context = min((context for users, context in steps if users == 1), default=0)
    alone = steps.get((1, first_context), {})
    yield "1 sequence, share of the floor (copy bandwidth)", 0.9, "share", alone.get("share_of_floor")

    runs = {(row["policy"], row["users"]): row for row in _rows(results, "table", "runs")}
    for users, wanted in ((50, 6000.0), (128, 12000.0)):
        rate = runs.get(("paged, continuous", users), {}).get("tokens_per_s")
        yield f"{users} users, 100 in and 200 out, tokens/s", wanted, "tokens/s", rate

    shares = [
        row["share_of_copy"]
        for row in _rows(results, "kernels", "decode attention")
        if row["batch"] >= MIN_BATCH and row["context"] >= MIN_CONTEXT
    ]
    name = f"decode attention from {MIN_BATCH} x {MIN_CONTEXT} on, worst share of copy"
    yield name, 0.8, "share", min(shares, default=None)

    speeds = [row.get("speed_relative_to_torch") for row in _rows(results, "kernels", "prefill attention")]
    known = [speed for speed in speeds if speed is not None]
    yield "prefill attention, worst share of torch's flash speed", 0.6, "share", min(known, default=None)

    ours = runs.get(("paged, continuous", 50), {}).get("tokens_per_s")
    baseline = runs.get(("contiguous, sequential (ollama)", 50), {}).get("tokens_per_s")
    ratio = ours / baseline if ours and baseline else None
    yield "50 users, paged and continuous against sequential", 15.0, "x", ratio

    idle = [row["idle_share"] for row in steps.values() if "idle_share" in row]
    yield "idle share of a steady decode step, worst", 0.03, "share", max(idle, default=None)


def _rows(results: dict[str, Any], part: str, section: str) -> list[Row]:
    rows: list[Row] = results.get(part, {}).get(section, [])
    return rows
