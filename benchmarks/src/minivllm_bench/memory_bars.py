"""The shares of the KV memory as bars: Kwon et al. 2023, Figure 2, measured again beside what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from minivllm_bench.block_map import COLOURS, KINDS, LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PUBLISHED: dict[str, dict[str, float]] = {
    "paged": {"tokens": 0.963},
    "orca-max": {"tokens": 0.204, "reserved": 0.133, "internal": 0.573, "external": 0.089},
    "orca-pow2": {"tokens": 0.268, "reserved": 0.179, "internal": 0.136, "external": 0.416},
    "orca-oracle": {"tokens": 0.382, "reserved": 0.252, "internal": 0.0, "external": 0.366},
}
"""Figure 2's shares, by allocation and kind. Of vLLM's it gives that of the tokens alone, and "external" is
"external fragmentation & others"."""

PUBLISHED_SEQUENCES = {"paged": 30.42, "orca-max": 7.00, "orca-pow2": 9.81, "orca-oracle": 13.62}
"""Figure 13a: requests batched on average, OPT-13B, ShareGPT, 2 requests per second."""

_QUIET = "#555555"


def draw(shares: Mapping[str, Mapping[str, float]], sequences: Mapping[str, float]) -> Figure:
    """A bar for each allocation, and a thinner one below it for the paper's.

    Args:
        shares: by allocation and kind, of the whole KV memory.
        sequences: by allocation, how many are served at once on average.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(10, 0.7 + 0.8 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    axes.text(1.012, -0.42, "at once", fontsize=8, color=_QUIET)
    for row, (name, parts) in enumerate(shares.items()):
        _bar(axes, row, parts, height=0.46, font_size=9)
        axes.text(1.012, row, f"{sequences[name]:.1f}", va="center", fontsize=9)
        if name in PUBLISHED:
            below = row + 0.36
            _bar(axes, below, PUBLISHED[name], height=0.22, font_size=7)
            axes.text(-0.004, below, "published", ha="right", va="center", fontsize=7, color=_QUIET)
            text = f"{PUBLISHED_SEQUENCES[name]:.1f}"
            axes.text(1.012, below, text, va="center", fontsize=7, color=_QUIET)
    axes.set_yticks(range(len(shares)), list(shares), fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(shares) - 0.4, -0.35)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the whole KV memory; at once: sequences, on average")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(facecolor=COLOURS[kind], label=LABELS[kind]) for kind in KINDS]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def _bar(axes: Axes, y: float, parts: Mapping[str, float], *, height: float, font_size: float) -> None:
    left = 0.0
    for kind in KINDS:
        share = parts.get(kind, 0.0)
        axes.barh(y, share, height, left=left, color=COLOURS[kind], edgecolor="white", linewidth=0.5)
        if share >= 0.03:
            colour = "white" if kind in ("tokens", "external") else "black"
            middle = left + share / 2
            axes.text(middle, y, f"{share:.1%}", ha="center", va="center", fontsize=font_size, color=colour)
        left += share
