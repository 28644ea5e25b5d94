"""The results as a short table on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(results: dict[str, Any]) -> Iterator[str]:
    """A line for each row that says something, and for each part that didn't end as it should."""

    def rows(part: str, section: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = results.get(part, {}).get(section, [])
        return found

    for row in rows("ceilings", "copy"):
        yield f"copy {row['gb_per_s']:,.0f} GB/s, read and written"
    for row in rows("ceilings", "product"):
        yield f"{row['dtype']} product {row['size']}: {row['tflop_per_s']:,.1f} TFLOP/s"
    for row in rows("kernels", "small kernels"):
        yield (
            f"{row['kernel']:<18} {row['tokens']:>6} tokens {row['us']:>10,.1f} µs "
            f"{row['gb_per_s']:>8,.0f} GB/s {row['share_of_copy']:>6.1%} of copy"
        )
    for row in rows("kernels", "prefill attention"):
        relative = row.get("speed_relative_to_torch")
        against = row["torch"] if relative is None else f"{relative:.0%} of torch's speed ({row['torch']})"
        yield (
            f"prefill attention  {row['tokens']:>6} tokens {row['us']:>10,.1f} µs "
            f"{row['tflop_per_s']:>6,.1f} TFLOP/s, {against}"
        )
    for row in rows("kernels", "decode attention"):
        yield (
            f"decode attention {row['batch']:>4} x {row['context']:<6} {row['us']:>10,.1f} µs "
            f"{row['gb_per_s']:>8,.0f} GB/s {row['share_of_copy']:>6.1%} of copy"
        )
    for row in rows("decode", "steps"):
        idle = f", idle {row['idle_share']:.1%}" if "idle_share" in row else ""
        yield (
            f"decode {row['users']:>4} x {row['context']:<5} {row['tokens_per_s']:>9,.0f} tokens/s, step "
            f"{row['step_ms']:.2f} ms, {row['share_of_floor']:.0%} of the floor's speed{idle}"
        )
    for row in rows("table", "runs"):
        yield (
            f"{row['users']:>4} users, {row['policy']:<32} {row['tokens_per_s']:>9,.0f} tokens/s, "
            f"TTFT {_times(row['ttft_ms'])}, ITL {_times(row['itl_ms'])}"
            + ("" if row["is_complete"] else f", cut: {row['finished']} finished")
        )
    for row in rows("transformers", "runs"):
        outcome = f"{row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else "failed"
        yield f"transformers, {row['name']}, {row['users']}: {outcome}"
    for row in rows("start", "starts"):
        yield (
            f"start to first token {row['seconds']['first token']:.1f} s "
            f"(Triton's cache {row['triton_cache']})"
        )
    for part, found in results.items():
        for row in found.get("skipped", []) if isinstance(found.get("skipped"), list) else []:
            yield f"{part}: left out {row['case']}: {row['reason']}"
        if isinstance(found.get("skipped"), str):
            yield f"{part}: left out: {found['skipped']}"
        if "cut" in found:
            yield f"{part}: cut: {found['cut']}"
        if "error" in found:
            yield f"{part}: failed: {found['error'].strip().splitlines()[-1]}"


def _times(times: dict[str, float] | None) -> str:
    return "-" if times is None else f"{times['p50']:.1f} / {times['p99']:.1f} ms (p50 / p99)"
