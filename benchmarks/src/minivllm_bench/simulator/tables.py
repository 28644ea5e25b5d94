"""Simulated figures as lines for a terminal."""

from __future__ import annotations

from minivllm_bench.results import Occupancy, Point
from minivllm_bench.simulator.measure import RatePoint
from minivllm_bench.steady_state import SteadyState

_COLUMNS = ("tok/s", "TTFT ms p50", "p99", "ITL ms p50", "p99", "at once", "KV taken")
USERS_HEAD = f"{'users':>8}" + "".join(f"{name:>12}" for name in (_COLUMNS[0], "a user", *_COLUMNS[1:]))
RATES_HEAD = f"{'sess./s':>8}" + "".join(f"{name:>12}" for name in (_COLUMNS[0], "ended/s", *_COLUMNS[1:]))


def users_row(point: Point) -> str:
    """One number of users. Times are milliseconds; ``>``: longer than anybody waited before the run ended."""
    figures = point["figures"]
    assert figures is not None
    speeds = (figures["output_throughput"], figures["user_throughput"])
    return f"{point['users']:>8}" + _row(speeds, figures, point["occupancy"]) + _failed(point["failed"])


def rate_row(point: RatePoint) -> str:
    """One rate."""
    figures = point["figures"]
    speeds = (figures["output_throughput"], point["summary"]["request_throughput"])
    return f"{point['rate']:>8g}" + _row(speeds, figures, point["occupancy"]) + _failed(point["failed"])


def _row(speeds: tuple[float, float], figures: SteadyState, occupancy: Occupancy | None) -> str:
    ttft, itl = figures["ttft"], figures["itl"]
    longest = ttft["longest"]
    cells = [f"{speed:.1f}" if speed < 1000 else f"{speed:.0f}" for speed in speeds]
    for wait in (ttft["p50"], ttft["p99"]):
        cells.append(_ms(wait) if wait is not None or longest is None else f">{_ms(longest)}")
    cells += [_ms(itl["p50"]), _ms(itl["p99"])]
    cells.append("-" if occupancy is None else f"{occupancy['running_mean']:.1f}")
    cells.append("-" if occupancy is None else f"{occupancy['kv_usage_mean']:.0%}")
    return "".join(f"{cell:>12}" for cell in cells)


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _failed(why: str | None) -> str:
    return "" if why is None else f"  {why}"
