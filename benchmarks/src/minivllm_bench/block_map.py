"""The block map: what each slot of the KV pool is at one moment, by physical address, as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from minivllm.config import BLOCK_SIZE
from minivllm.engine.block_manager import BlockManager
from minivllm.request import Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch

BLOCKS_PER_ROW = 128  # 2,048 tokens: where each sequence gets so many, a row is a sequence
MAX_ROWS = 24
_ROW_SLOTS = BLOCKS_PER_ROW * BLOCK_SIZE

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
_FRAME = "black"


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
            for block, piece in zip(request.block_table, pieces, strict=True):
                by_block.setdefault(block, piece)
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

    Every second sequence's tokens are lighter. The sequence with most tokens has a black frame. Of a pool of
    more than :data:`MAX_ROWS` rows, only so many are drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    num_rows = min(MAX_ROWS, max(-(-found.num_blocks // BLOCKS_PER_ROW) for found in maps.values()))
    panel, between, legend = num_rows * 0.17, 0.42, 0.75  # inches
    height = len(maps) * (panel + between) + legend
    figure = Figure(figsize=(10, height))
    for index, (name, found) in enumerate(maps.items()):
        bottom = height - (index + 1) * (panel + between)
        axes = figure.add_axes((0.015, bottom / height, 0.97, panel / height))
        _draw_map(axes, found, num_rows)
        share = found.count("tokens") / (found.num_blocks * BLOCK_SIZE)
        title = f"{name}: {found.num_sequences} sequences, {share:.1%} of the slots hold a token"
        if found.num_blocks > num_rows * BLOCKS_PER_ROW:
            title += f" (drawn: the first {num_rows * BLOCKS_PER_ROW} of {found.num_blocks} blocks)"
        axes.set_title(title, loc="left", fontsize=10, pad=4)
    handles = [Patch(facecolor=COLOURS[kind], label=LABELS[kind]) for kind in KINDS]
    handles.insert(1, Patch(facecolor=_OTHER_TOKENS, label="…of every second sequence"))
    handles.append(Patch(facecolor="white", edgecolor=_FRAME, label="the longest sequence"))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.text(
        0.5,
        0.38 / height,
        f"A cell is a block of {BLOCK_SIZE} tokens, a row {BLOCKS_PER_ROW} blocks, by physical address.",
        ha="center",
        fontsize=8,
    )
    return figure


def _draw_map(axes: Axes, found: BlockMap, num_rows: int) -> None:
    by_colour: dict[str, list[Piece]] = {}
    frames: list[Piece] = []
    for span in found.spans:
        colour = COLOURS[span.kind]
        if span.kind == "tokens" and span.sequence is not None and span.sequence % 2:
            colour = _OTHER_TOKENS
        pieces = [piece for piece in _by_rows(span) if piece.row < num_rows]
        by_colour.setdefault(colour, []).extend(pieces)
        if span.sequence == found.longest:
            frames += pieces
    for colour, pieces in by_colour.items():
        axes.add_patch(_rectangles(pieces, facecolor=colour, linewidth=0))
    edges = [(edge, edge, math.nan) for edge in range(0, _ROW_SLOTS, BLOCK_SIZE)]
    axes.plot([x for edge in edges for x in edge], [0, num_rows, math.nan] * len(edges), "w-", linewidth=0.5)
    axes.add_patch(_rectangles(_joined(frames), facecolor="none", edgecolor=_FRAME, linewidth=1.1))
    axes.set_xlim(0, _ROW_SLOTS)
    axes.set_ylim(num_rows, 0)
    axes.set_axis_off()


class Piece(NamedTuple):
    """Slots ``start`` to ``end`` of one row of the picture."""

    row: int
    start: int
    end: int


def _rectangles(pieces: list[Piece], **style: Any) -> PathPatch:
    """All as one shape, which makes the file a tenth as long as one shape each."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = []
    for row, start, end in pieces:
        top, bottom = row + 0.08, row + 0.92
        corners += [(start, top), (end, top), (end, bottom), (start, bottom), (start, top)]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(pieces)
    return PathPatch(Path(corners or [(0, 0)], codes or [Path.MOVETO]), **style)


def _by_rows(span: Span) -> Iterator[Piece]:
    position, end = span.start, span.start + span.num_slots
    while position < end:
        row, start = divmod(position, _ROW_SLOTS)
        stop = min(end, (row + 1) * _ROW_SLOTS)
        yield Piece(row, start, start + stop - position)
        position = stop


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Pieces in order, with those that touch made one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].row == piece.row and joined[-1].end == piece.start:
            joined[-1] = joined[-1]._replace(end=piece.end)
        else:
            joined.append(piece)
    return joined
