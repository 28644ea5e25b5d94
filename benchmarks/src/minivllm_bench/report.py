"""``report.html``: a comparison on one page that needs nothing else."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from minivllm.config import format_size
from minivllm_bench import plots
from minivllm_bench.compare_config import MODES
from minivllm_bench.findings import BASELINE, BEST, Findings
from minivllm_bench.knee import GROWTH, LEAD
from minivllm_bench.published import PUBLISHED
from minivllm_bench.results import AgentRun, Comparison, Contender, Point
from minivllm_bench.steady_state import Waits

NOT_MEASURED = "–"


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``report.html``, and ``compare.svg`` if there is a curve to draw. Returns what was written."""
    report = folder / "report.html"
    report.write_text(render(comparison), encoding="utf-8")
    key_plot = plots.throughput(Findings(comparison))
    if key_plot is None:
        return [report]
    plot = folder / "compare.svg"
    plot.write_text(plots.alone(key_plot), encoding="utf-8")
    return [report, plot]


def render(comparison: Comparison) -> str:
    """The page."""
    findings = Findings(comparison)
    settings = comparison["settings"]
    environment = Environment(
        loader=PackageLoader("minivllm_bench", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        settings=settings,
        kv_cache_memory=format_size(settings["kv_cache_memory"]),
        headline=findings.headline(),
        contenders=[_contender(contender, findings) for contender in findings.contenders],
        throughput_rows=_throughput_rows(findings),
        has_ratio=findings.headline_users() is not None,
        best=findings.label(BEST),
        baseline=findings.label(BASELINE),
        crossings=_crossings(findings),
        agent_counts=findings.agent_counts,
        plots=_plots(findings),
        published=[(published, published.here(findings)) for published in PUBLISHED],
        not_measured=_not_measured(findings),
        machine={name: _plain(value) for name, value in comparison["machine"].items() if value},
        minutes=None if comparison["seconds"] is None else f"{comparison['seconds'] / 60:.1f}",
        growth=f"{GROWTH:.0%}",
        lead=f"{LEAD:.0%}",
    )


def seconds(value: float | None) -> str:
    """A time for people."""
    if value is None:
        return NOT_MEASURED
    if value < 0.0995:
        return f"{1000 * value:.0f} ms"
    return f"{value:.2f} s" if value < 9.95 else f"{value:.0f} s"


def wait(waits: Waits, percentile: str) -> str:
    """A percentile, or that it is longer than anybody has waited."""
    value = {"p50": waits["p50"], "p90": waits["p90"], "p99": waits["p99"]}[percentile]
    if value is None and waits["longest"] is not None:
        return f"> {seconds(waits['longest'])}"
    return seconds(value)


def tokens(value: float | None) -> str:
    """Tokens per second for people."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _state(point: Point | None) -> str | None:
    """Why a point has no number; None if it has one."""
    if point is None or point["skipped"] is not None:
        return NOT_MEASURED
    return "failed" if point["failed"] is not None or point["figures"] is None else None


def _throughput_rows(findings: Findings) -> list[dict[str, Any]]:
    rows = []
    for users in findings.user_counts:
        ratio = findings.ratio(BEST, BASELINE, users)
        rows.append(
            {
                "users": users,
                "cells": [
                    _state(findings.point(contender["name"], users))
                    or tokens(findings.throughput(contender["name"], users))
                    for contender in findings.contenders
                ],
                "ratio": NOT_MEASURED if ratio is None else f"{ratio:.1f} ×",
                "is_headline": users == findings.headline_users(),
            }
        )
    return rows


def _contender(contender: Contender, findings: Findings) -> dict[str, Any]:
    """All that the page says of one contender."""
    name = contender["name"]
    curve, knee = findings.curve(name), findings.knee(name)
    running = [p["occupancy"]["running_max"] for p in findings.measured(name) if p["occupancy"] is not None]
    if len(curve) < 2:
        knee_text = NOT_MEASURED
    else:
        knee_text = f"none up to {max(curve)}" if knee is None else str(knee)
    return {
        "name": name,
        "label": contender["label"],
        "is_peer": contender["is_peer"],
        "flags": " ".join(MODES[name].flags) if name in MODES else "",
        "command": shlex.join(contender["command"]),
        "start": seconds(contender["start_seconds"]),
        "failed": contender["failed"],
        "peak": tokens(findings.peak(name)),
        "knee": knee_text,
        "running": str(max(running)) if running else NOT_MEASURED,
        "rows": [_row(point) for point in contender["points"]],
        "agents": [_agents(findings.agents(name, users)) for users in findings.agent_counts],
    }


def _row(point: Point) -> dict[str, Any]:
    """One number of users in a contender's own table."""
    state, figures, occupancy = _state(point), point["figures"], point["occupancy"]
    if state is not None or figures is None:
        return {"users": point["users"], "state": point["failed"] or point["skipped"] or state, "cells": []}
    cells = [
        tokens(figures["output_throughput"]),
        tokens(figures["user_throughput"]),
        *(wait(figures["ttft"], percentile) for percentile in ("p50", "p90", "p99")),
        *(seconds(figures["itl"][percentile]) for percentile in ("p50", "p90", "p99")),
    ]
    if occupancy is None:
        cells += [NOT_MEASURED] * 3
    else:
        cells += [f"{occupancy['running_mean']:.0f}", f"{occupancy['waiting_mean']:.0f}"]
        cells += [f"{occupancy['kv_usage_mean']:.0%}"]
    cells += [f"{figures['completed']} of {figures['requests']}"]
    return {"users": point["users"], "state": None, "cells": cells}


def _agents(run: AgentRun | None) -> dict[str, str]:
    """The slowest of so many agents."""
    cell = {"seconds": NOT_MEASURED, "steps_done": "", "cached": NOT_MEASURED}
    if run is None or run["skipped"] is not None:
        return cell
    if run["failed"] is not None or not run["seconds"] or run["limit"] is None:
        return {**cell, "seconds": "failed"}
    done = [value for value in run["seconds"] if value is not None]
    if len(done) == len(run["seconds"]):
        cell["seconds"] = seconds(max(done))
    else:
        cell["seconds"] = f"> {seconds(run['limit'])}"
        cell["steps_done"] = f"the slowest had done {min(run['steps_done'])} of {run['steps']} steps"
    if run["prompt_tokens"]:
        cell["cached"] = f"{run['cached_tokens'] / run['prompt_tokens']:.0%}"
    return cell


def _crossings(findings: Findings) -> list[str]:
    others = [contender["name"] for contender in findings.contenders if contender["name"] != BEST]
    words = [findings.crossing_words(BEST, name) for name in others]
    return [part for part in words if part is not None]


def _plots(findings: Findings) -> dict[str, Markup | None]:
    drawn = {
        "throughput": plots.throughput(findings),
        "user_throughput": plots.user_throughput(findings),
        "first_token": plots.first_token(findings),
        "inter_token": plots.inter_token(findings),
        "running": plots.running(findings),
        "agents": plots.agents(findings),
    }
    # Made here from numbers, and from labels as outlines: there is nothing in them to escape.
    return {name: None if svg is None else Markup(svg) for name, svg in drawn.items()}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


def _not_measured(findings: Findings) -> list[str]:
    """What is missing, and why, one line for each reason."""
    lines = []
    for contender in findings.contenders:
        reasons: dict[str, list[str]] = {}
        if contender["failed"] is not None:
            reasons[contender["failed"]] = ["failed"]
        for point in contender["points"]:
            if reason := point["failed"] or point["skipped"]:
                reasons.setdefault(reason, []).append(_count(point["users"], "user"))
        for run in contender["agents"]:
            if reason := run["failed"] or run["skipped"]:
                reasons.setdefault(reason, []).append(_count(run["users"], "agent"))
        lines += [f"{contender['label']}, {', '.join(what)}: {reason}" for reason, what in reasons.items()]
    return lines
