"""The block map: what each slot of the KV pool is at one moment, in order of physical address, as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from minivllm.config import BLOCK_SIZE
from minivllm.engine.block_manager import BlockManager
from minivllm.request import Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCKS_PER_ROW = 128  # 2,048 tokens: where each sequence gets so many, a row is a sequence

KINDS = ("tokens", "reserved", "internal", "external", "free")
LABELS = {
    "tokens": "holds a token",
    "reserved": "reserved",
    "internal": "lost inside",
    "external": "lost outside",
    "free": "free",
}
# Told apart by lightness, too, and so without colour vision.
COLOURS = {
    "tokens": "#0b4f8a",
    "reserved": "#9fd0f5",
    "internal": "#f2c14e",
    "external": "#b5482a",
    "free": "#e9e9e9",
}
_OTHER_TOKENS = "#3f86c4"  # every second sequence's
_MARK = "#000000"


class Span(NamedTuple):
    """Slots beside each other that are alike."""

    start: int
    """Slot: block id × BLOCK_SIZE + offset in the block."""
    num_slots: int
    kind: str
    """One of :data:`KINDS`."""
    sequence: int | None
    """Whose they are, numbered in the order of admission; None: nobody's."""


class BlockMap(NamedTuple):
    """A pool at one moment."""

    num_blocks: int
    spans: list[Span]
    """All slots, in order of physical address."""
    num_sequences: int
    longest: int
    """The sequence that holds most tokens."""

    def count(self, kind: str) -> int:
        """Slots of one kind."""
        return sum(span.num_slots for span in self.spans if span.kind == kind)

    @classmethod
    def take(cls, manager: BlockManager, running: list[Request]) -> BlockMap:
        """The map of a manager's pool.

        Args:
            running: all requests that hold blocks, in order of admission. A block of several belongs to the
                first.
        """
        by_block: dict[int, list[Span]] = {}
        for number, request in enumerate(running):
            pieces = _pieces(manager, request, number)
            for block, spans in zip(request.block_table, pieces, strict=True):
                by_block.setdefault(block, spans)
        stranded = set(manager.stranded_blocks())
        spans: list[Span] = []
        for block in range(manager.num_blocks):
            kind = "external" if block in stranded else "free"
            for span in by_block.get(block) or [Span(block * BLOCK_SIZE, BLOCK_SIZE, kind, None)]:
                last = spans[-1] if spans else None
                if last is not None and (last.kind, last.sequence) == (span.kind, span.sequence):
                    spans[-1] = last._replace(num_slots=last.num_slots + span.num_slots)
                else:
                    spans.append(span)
        longest = max(range(len(running)), key=lambda number: running[number].num_computed_tokens, default=0)
        return cls(manager.num_blocks, spans, len(running), longest)


def _pieces(manager: BlockManager, request: Request, number: int) -> Iterator[list[Span]]:
    """The spans of each block of a table: tokens come first in it, then what is reserved, and so on."""
    held, reserved, internal = manager.allocated_slots(request)
    ends = [held, held + reserved, held + reserved + internal, len(request.block_table) * BLOCK_SIZE]
    for index, block in enumerate(request.block_table):
        spans, position, last = [], index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE
        for kind, end in zip(KINDS, ends, strict=False):
            num_slots = min(end, last) - position
            if num_slots > 0:
                start = block * BLOCK_SIZE + position % BLOCK_SIZE
                spans.append(Span(start, num_slots, kind, number))
                position += num_slots
        yield spans


def draw(maps: Mapping[str, BlockMap]) -> Figure:
    """One panel for each allocation, one cell for each block, :data:`BLOCKS_PER_ROW` in a row.

    Every second sequence's tokens are lighter. The sequence with most tokens has a black frame.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [-(-found.num_blocks // BLOCKS_PER_ROW) for found in maps.values()]
    row_height, between, legend = 0.17, 0.42, 0.55  # inches
    height = sum(rows) * row_height + len(maps) * between + legend
    figure = Figure(figsize=(10, height))
    top = height
    for (name, found), num_rows in zip(maps.items(), rows, strict=True):
        top -= between + num_rows * row_height
        axes = figure.add_axes((0.015, top / height, 0.97, num_rows * row_height / height))
        _draw_map(axes, found, num_rows)
        share = found.count("tokens") / (found.num_blocks * BLOCK_SIZE)
        axes.set_title(
            f"{name}: {found.num_sequences} sequences, {share:.1%} of the slots hold a token",
            loc="left",
            fontsize=10,
            pad=4,
        )
    handles = [Patch(facecolor=COLOURS[kind], label=LABELS[kind]) for kind in KINDS]
    handles.insert(1, Patch(facecolor=_OTHER_TOKENS, label="…of every second sequence"))
    handles.append(Patch(facecolor="white", edgecolor=_MARK, label="the longest sequence"))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _draw_map(axes: Axes, found: BlockMap, num_rows: int) -> None:
    row_slots = BLOCKS_PER_ROW * BLOCK_SIZE
    frames: list[tuple[int, int, int]] = []  # row, first and last slot in it
    for span in found.spans:
        colour = COLOURS[span.kind]
        if span.kind == "tokens" and span.sequence is not None and span.sequence % 2:
            colour = _OTHER_TOKENS
        for row, start, end in _by_rows(span, row_slots):
            axes.broken_barh([(start, end - start)], (row + 0.08, 0.84), color=colour, linewidth=0)
            if span.sequence == found.longest and span.kind != "free":
                frames.append((row, start, end))
    last_row = num_rows - 1
    for edge in range(BLOCK_SIZE, row_slots, BLOCK_SIZE):
        is_in_last_row = last_row * row_slots + edge < found.num_blocks * BLOCK_SIZE
        axes.vlines(edge, 0, num_rows if is_in_last_row else last_row, colors="white", linewidth=0.5)
    for row, start, end in _joined(frames):
        axes.broken_barh(
            [(start, end - start)], (row + 0.08, 0.84), facecolor="none", edgecolor=_MARK, linewidth=1.1
        )
    axes.set_xlim(0, row_slots)
    axes.set_ylim(num_rows, 0)
    axes.set_axis_off()


def _by_rows(span: Span, row_slots: int) -> Iterator[tuple[int, int, int]]:
    """A span as (row, first slot in it, last slot in it)."""
    position, end = span.start, span.start + span.num_slots
    while position < end:
        row = position // row_slots
        stop = min(end, (row + 1) * row_slots)
        yield row, position - row * row_slots, stop - row * row_slots
        position = stop


def _joined(pieces: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Pieces of rows, in order, with those that touch made one."""
    joined: list[tuple[int, int, int]] = []
    for row, start, end in pieces:
        if joined and joined[-1][0] == row and joined[-1][2] == start:
            joined[-1] = row, joined[-1][1], end
        else:
            joined.append((row, start, end))
    return joined
