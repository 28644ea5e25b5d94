"""Plots of a comparison, as SVG, in the page's own colour; text as outlines, to look alike everywhere."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from minivllm_bench.compare_config import MODES
from minivllm_bench.findings import Findings
from minivllm_bench.steady_state import Waits

_INK = "#010203"
"""Stands for the page's text colour until the figure is SVG."""

_COLOURS = {"paged": "#0077bb", "contiguous": "#009988", "sequential-4": "#ee7733", "sequential-1": "#cc3311"}
_PEER_COLOURS = ("#ee3377", "#33bbee", "#888888", "#aa8800", "#aa66cc")
"""Paul Tol's vibrant palette, and what goes with it: told apart with any colour vision, on light and dark."""

_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "h")
_WIDTH, _HEIGHT = 7.2, 3.7


@dataclass(slots=True)
class Line:
    """A contender's values over the number of users."""

    label: str
    colour: str
    marker: str
    values: dict[int, float] = field(default_factory=dict)
    at_least: dict[int, float] = field(default_factory=dict)
    """What is only known to be more than this: drawn as an arrow."""
    is_dashed: bool = False


def throughput(findings: Findings) -> str | None:
    """Tokens per second of all users together."""
    return _plot(_lines(findings, findings.curve), "output tokens per second, all users together")


def user_throughput(findings: Findings) -> str | None:
    """Tokens per second of one user, waiting included."""

    def values(name: str) -> dict[int, float]:
        return {users: tokens / users for users, tokens in findings.curve(name).items()}

    return _plot(_lines(findings, values), "output tokens per second and user", is_log=True)


def first_token(findings: Findings) -> str | None:
    """Time to first token: median, and 99th percentile, dashed."""
    lines = []
    for is_tail in (False, True):
        for line, name in _empty_lines(findings):
            line.is_dashed = is_tail
            for point in findings.measured(name):
                if point["figures"] is not None:
                    _add_wait(line, point["users"], point["figures"]["ttft"], is_tail)
            lines.append(line)
    return _plot(lines, "seconds to the first token", is_log=True)


def inter_token(findings: Findings) -> str | None:
    """Time between tokens: median, and 99th percentile, dashed."""
    lines = []
    for percentile in ("p50", "p99"):
        for line, name in _empty_lines(findings):
            line.is_dashed = percentile == "p99"
            for point in findings.measured(name):
                gap = None if point["figures"] is None else point["figures"]["itl"][percentile]
                if gap is not None:
                    line.values[point["users"]] = 1000 * gap
            lines.append(line)
    return _plot(lines, "milliseconds between tokens", is_log=True)


def running(findings: Findings) -> str | None:
    """Sequences in the batch, on average."""

    def values(name: str) -> dict[int, float]:
        return {
            point["users"]: point["occupancy"]["running_mean"]
            for point in findings.measured(name)
            if point["occupancy"] is not None
        }

    return _plot(_lines(findings, values), "sequences that run at once")


def agents(findings: Findings) -> str | None:
    """How long an agent's steps took: one bar per contender and number of agents."""
    bars: list[tuple[str, str, float, bool]] = []
    for users in findings.agent_counts:
        for line, name in _empty_lines(findings):
            run = findings.agents(name, users)
            if run is None or run["failed"] is not None or not run["seconds"] or run["limit"] is None:
                continue
            is_done = all(seconds is not None for seconds in run["seconds"])
            slowest = max(s or run["limit"] for s in run["seconds"])
            label = line.label if len(findings.agent_counts) == 1 else f"{line.label}, {users} at once"
            bars.append((label, line.colour, slowest, is_done))
    if not bars:
        return None
    figure = Figure(figsize=(_WIDTH, 0.7 + 0.36 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    bars.reverse()
    axes.barh([bar[0] for bar in bars], [bar[2] for bar in bars], color=[bar[1] for bar in bars], height=0.62)
    for place, (_, _, seconds, is_done) in enumerate(bars):
        text = f" {seconds:.1f} s" if is_done else f" longer than {seconds:.0f} s →"
        axes.text(seconds, place, text, va="center", color=_INK)
    axes.set_xlim(0, max(bar[2] for bar in bars) * 1.28)
    axes.set_xlabel("seconds until all steps are done")
    axes.tick_params(left=False)
    _dress(axes)
    return _svg(figure)


def _empty_lines(findings: Findings) -> list[tuple[Line, str]]:
    lines, peers = [], 0
    for place, contender in enumerate(findings.contenders):
        name = contender["name"]
        colour = _COLOURS.get(name)
        if colour is None:
            colour = _PEER_COLOURS[peers % len(_PEER_COLOURS)]
            peers += 1
        # A peer's label goes on with its model, which is too long for a plot.
        label = contender["label"] if name in MODES else name
        lines.append((Line(label, colour, _MARKERS[place % len(_MARKERS)]), name))
    return lines


def _lines(findings: Findings, values: Callable[[str], dict[int, float]]) -> list[Line]:
    lines = []
    for line, name in _empty_lines(findings):
        line.values = values(name)
        lines.append(line)
    return lines


def _add_wait(line: Line, users: int, wait: Waits, is_tail: bool) -> None:
    value = wait["p99"] if is_tail else wait["p50"]
    if value is not None:
        line.values[users] = value
    elif wait["longest"] is not None and not (is_tail and wait["p50"] is None):  # one arrow is enough
        line.at_least[users] = wait["longest"]


def _plot(lines: Sequence[Line], title: str, *, is_log: bool = False) -> str | None:
    """None where there is nothing to draw."""
    drawn = [line for line in lines if line.values or line.at_least]
    if not drawn:
        return None
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    # Room on the right for the lines' labels.
    axes = figure.add_axes((0.075, 0.135, 0.635, 0.765))
    counts = sorted({users for line in drawn for users in (*line.values, *line.at_least)})
    axes.set_xscale("log", base=2)
    axes.set_xlim(counts[0] / 1.12, counts[-1] * 1.12)
    if is_log:
        axes.set_yscale("log")
    for line in drawn:
        _draw(axes, line)
    low, high = axes.get_ylim()
    has_arrows = any(line.at_least for line in drawn)
    axes.set_ylim(low if is_log else 0, high * 1.6 if has_arrows else high)
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(_spread(counts)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda users, _: f"{users:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("users at once")
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK)
    _dress(axes)
    axes.grid(axis="y", color=_INK, alpha=0.14, linewidth=0.7)
    _label_ends(figure, axes, drawn)
    return _svg(figure)


def _draw(axes: Axes, line: Line) -> None:
    known = sorted(line.values.items())
    style = "--" if line.is_dashed else "-"
    axes.plot(
        [users for users, _ in known],
        [value for _, value in known],
        color=line.colour,
        linestyle=style,
        linewidth=1.2 if line.is_dashed else 2.0,
        marker=line.marker,
        markersize=3.5 if line.is_dashed else 5.5,
        alpha=0.75 if line.is_dashed else 1.0,
        clip_on=False,
    )
    unknown = sorted(line.at_least.items())
    to_arrows = [entry for entry in known if unknown and entry[0] < unknown[0][0]][-1:] + unknown
    axes.plot(
        [users for users, _ in to_arrows],
        [value for _, value in to_arrows],
        color=line.colour,
        linestyle=":",
        linewidth=1.4,
        alpha=0.75,
    )
    for users, value in unknown:
        axes.plot([users], [value], color=line.colour, marker="_", markersize=8, markeredgewidth=1.6)
        axes.annotate(
            "",
            xy=(users, value),
            xytext=(0, 15),
            textcoords="offset points",
            arrowprops={"arrowstyle": "<-", "color": line.colour, "linewidth": 1.6, "shrinkB": 0},
            annotation_clip=False,
        )


def _spread(counts: Sequence[int]) -> list[int]:
    """Those counts that leave each other room on a logarithmic axis."""
    room = max(math.log2(counts[-1] / counts[0]) / 14, 0.0)
    shown: list[int] = []
    for users in counts:
        if not shown or math.log2(users / shown[-1]) > room:
            shown.append(users)
    return shown


def _label_ends(figure: Figure, axes: Axes, lines: Sequence[Line]) -> None:
    """Each solid line's label beside its end, moved apart where they would overlap."""
    height = axes.bbox.height
    wanted = []
    for line in lines:
        if line.is_dashed:
            continue
        points = {**line.at_least, **line.values}
        end = max(points)
        wanted.append((float(axes.transData.transform((end, points[end]))[1] - axes.bbox.y0), line))
    wanted.sort(key=lambda entry: entry[0])
    gap = 15.0 * figure.dpi / 72
    places: list[float] = []
    for place, _ in wanted:
        places.append(max(place, places[-1] + gap) if places else max(place, gap / 3))
    excess = max(0.0, places[-1] - height) if places else 0.0
    for number in range(len(places) - 1, -1, -1):  # what went over the top pushes down again
        top = height if number == len(places) - 1 else places[number + 1] - gap
        places[number] = min(places[number], top) if excess else places[number]
    for place, (_, line) in zip(places, wanted, strict=True):
        axes.text(
            1.035,
            place / height,
            line.label,
            transform=axes.transAxes,
            color=line.colour,
            va="center",
            fontsize=9.8,
        )


def _dress(axes: Axes) -> None:
    """No more lines than needed, all in the page's colour."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
        axes.spines[side].set_alpha(0.5)
    axes.tick_params(colors=_INK, which="both")
    axes.xaxis.label.set_color(_INK)
    axes.set_facecolor("none")
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    """The figure as an element for a page: transparent, and in ``currentColor`` where it is ink."""
    figure.patch.set_alpha(0)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "minivllm"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Elements' names would be there once per plot; what is referred to keeps its own.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))


def alone(svg: str) -> str:
    """A plot as a file of its own: it brings its colours, light and dark."""
    style = (
        "<style>svg{color:#1f2328;background:#fff}"
        "@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117;filter:brightness(1.35)}}</style>"
    )
    end = svg.index(">") + 1
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:end]}{style}{svg[end:]}\n'
