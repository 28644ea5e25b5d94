"""A run's figures as lines for a terminal."""

from __future__ import annotations

from typing import Any

_ROWS = {"ttft": "time to first token", "tpot": "time per token", "itl": "inter-token", "e2e": "end to end"}


def render(result: dict[str, Any]) -> str:
    """What ``minivllm bench serve`` prints. ``result`` is the head of its JSON."""
    summary, load = result["summary"], result["load"]
    how = (
        f"{load['users']} users"
        if load["users"] is not None
        else f"{load['rate']:g} sessions/s, burstiness {load['burstiness']:g}"
    )
    lines = [
        f"{result['model']} at {result['url']}: {result['workload']}, {how}, seed {load['seed']}",
        "",
        f"requests      {summary['completed']} completed, {summary['failed']} failed, "
        f"{summary['unfinished']} unfinished, in {summary['seconds']:.2f} s",
    ]
    lines += [f"              {count} x {error}" for error, count in summary["errors"].items()]
    lines += [
        f"tokens        {summary['prompt_tokens']} of prompts, {summary['cached_tokens']} of them from the "
        f"server's cache, {summary['output_tokens']:.0f} of answers",
        f"throughput    {summary['request_throughput']:.2f} requests/s, {summary['output_throughput']:.1f} "
        f"output tokens/s, {summary['total_throughput']:.1f} tokens/s in all",
    ]
    if summary["goodput"] is not None:
        limits = [f"{name} {s * 1000:g} ms" for name, s in summary["goals"].items() if s is not None]
        lines.append(f"goodput       {summary['goodput']:.2f} requests/s within {', '.join(limits)}")
    lines.append(f"this client   {result['generator_cpu_share']:.1%} of one core")
    columns = list(summary["ttft"])
    lines += ["", f"{'ms':20}" + "".join(f"{name:>10}" for name in columns)]
    for key, name in _ROWS.items():
        values = (summary[key][column] for column in columns)
        cells = ("-" if value is None else f"{value * 1000:.1f}" for value in values)
        lines.append(f"{name:20}" + "".join(f"{cell:>10}" for cell in cells))
    if any(summary[key]["mean"] is None and summary["unfinished"] for key in _ROWS):
        lines.append("-: longer than the run")
    return "\n".join(lines)
