"""Weights of 4 or 8 bits: as files have them, and as the kernels read them.

Every group of 32 columns of a row has a scale d of its own (float16), as in GGUF's Q4_0, Q4_1 and Q8_0:

    4 bits:  w = d * u + m    u from 0 to 15, m float16
    8 bits:  w = d * q        q from -128 to 127

:class:`QuantizedRows` is a tensor in that form; :class:`PackedWeight` is one or several of them below
each other, rearranged for a product: 16 rows (a panel) and 32 columns (a group) are one contiguous
run of bytes, in which four columns of all 16 rows lie next to each other. No bit is added or lost.

    4 bits:  [4 quads][16 rows][4] bytes, low nibble column 4 * quad + i, high nibble 16 columns on;
             d of 16 rows; m of 16 rows            320 bytes, 5 bits a weight
    8 bits:  [8 quads][16 rows][4] bytes, q + 128;
             d of 16 rows                          544 bytes, 8.5 bits a weight
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP = 32
PANEL = 16
_BLOCK_BYTES = {4: PANEL * GROUP // 2 + 2 * PANEL * 2, 8: PANEL * GROUP + PANEL * 2}


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A quantised weight [rows, columns]; a group that the columns don't fill is padded with zeros."""

    bits: int
    columns: int
    values: torch.Tensor
    """4 bits: uint8 [rows, groups, 16], low nibble column i, high one column i + 16.
    8 bits: int8 [rows, groups, 32]."""
    scales: torch.Tensor
    """float16 [rows, groups]."""
    mins: torch.Tensor | None
    """float16 [rows, groups] for 4 bits, None for 8."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.values.shape[0], self.columns

    def dequantize(self) -> torch.Tensor:
        """float32 [rows, columns]."""
        if self.bits == 4:
            assert self.mins is not None
            u = torch.cat((self.values & 15, self.values >> 4), dim=-1)
            weight = u * self.scales.float()[..., None] + self.mins.float()[..., None]
        else:
            weight = self.values * self.scales.float()[..., None]
        return weight.flatten(1)[:, : self.columns].contiguous()


def quantize_int8(weight: torch.Tensor) -> QuantizedRows:
    """Round a weight [rows, columns] to 8 bits, symmetrically, with one scale for each 32 columns."""
    rows, columns = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -columns % GROUP)).view(rows, -1, GROUP)
    scales = (groups.abs().amax(-1) / 127).half()
    # Rounded against the scale as it is stored; a scale that underflows makes its group zero.
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    values = (groups * inverse[..., None]).round().clamp(-127, 127).to(torch.int8)
    return QuantizedRows(8, columns, values, scales, None)


class PackedWeight:
    """A weight [rows, columns] as the kernels read it; empty until its rows have been written.

    Attributes:
        blocks: uint8 [panels, groups, block bytes]. Rows past the last are zero.
        shape: rows and columns, as a tensor's.
        arguments: what the C++ kernels take for it: address of the blocks, bits, rows, columns.
    """

    def __init__(self, rows: int, columns: int, bits: int) -> None:
        self.rows, self.columns, self.bits = rows, columns, bits
        self.shape = rows, columns
        num_panels, num_groups = -(-rows // PANEL), -(-columns // GROUP)
        self.blocks = torch.empty(num_panels, num_groups, _BLOCK_BYTES[bits], dtype=torch.uint8)
        self.blocks[-1] = 0
        self.arguments = self.blocks.data_ptr(), bits, rows, columns

    @property
    def num_bytes(self) -> int:
        """Memory of the weight."""
        return self.blocks.numel()

    def write(self, start: int, source: QuantizedRows) -> None:
        """Put ``source``, of the same columns and bits, at rows ``start`` and on. Mutates ``blocks``."""
        if source.bits != self.bits or source.columns != self.columns:
            raise ValueError(
                f"source must have {self.bits} bits and {self.columns} columns, "
                f"got {source.bits} and {source.columns}"
            )
        num_rows = len(source.values)
        values = source.values if self.bits == 4 else source.values.view(torch.uint8) ^ 128
        parts = [(self._values(), values.view(num_rows, -1, self.bits, 4)), (self._numbers(0), source.scales)]
        if source.mins is not None:
            parts.append((self._numbers(1), source.mins))
        for to, rows in parts:
            if start % PANEL == 0 and num_rows % PANEL == 0:
                panels = rows.reshape(-1, PANEL, *rows.shape[1:])
                to[start // PANEL :][: len(panels)].copy_(panels)
            else:
                index_R = torch.arange(start, start + num_rows)
                to[index_R // PANEL, index_R % PANEL] = rows

    def read(self) -> QuantizedRows:
        """What was written: the inverse of :meth:`write` over all rows."""
        values = self._values().flatten(0, 1)[: self.rows].flatten(2)
        scales, *mins = (
            self._numbers(i).flatten(0, 1)[: self.rows] for i in range(2 if self.bits == 4 else 1)
        )
        if self.bits == 8:
            values = (values ^ 128).view(torch.int8)
        return QuantizedRows(self.bits, self.columns, values, scales, mins[0] if mins else None)

    def _values(self) -> torch.Tensor:
        """View of the bytes: [panels, 16 rows, groups, quads, 4]."""
        num_quads = self.bits  # 4 or 8: a quad of 4-bit rows has eight columns
        quads = self.blocks[..., : num_quads * PANEL * 4]
        return quads.view(*quads.shape[:2], num_quads, PANEL, 4).movedim(3, 1)

    def _numbers(self, index: int) -> torch.Tensor:
        """View of d (0) or m (1): float16 [panels, 16 rows, groups]."""
        start = PANEL * GROUP * self.bits // 8 + index * PANEL * 2
        return self.blocks[..., start : start + PANEL * 2].view(torch.float16).movedim(2, 1)


class PackedRows:
    """Rows [start, start + rows) of a packed weight: where one tensor of a checkpoint goes."""

    def __init__(self, weight: PackedWeight, start: int, rows: int) -> None:
        self._weight, self._start = weight, start
        self.shape = (rows, weight.columns)

    @property
    def num_bytes(self) -> int:
        """These rows' share of the weight's memory."""
        return self._weight.num_bytes * self.shape[0] // self._weight.rows

    def copy_(self, source: torch.Tensor | QuantizedRows) -> None:
        """Write the tensor. Mutates the weight.

        Into 8 bits anything can be written, and is rounded where need be; into 4 bits only what has 4.

        Raises:
            ValueError: another shape, or 4 bits are wanted and the source has others.
        """
        if tuple(source.shape) != self.shape:
            raise ValueError(f"source must have shape {self.shape}, got {tuple(source.shape)}")
        if not isinstance(source, QuantizedRows) or source.bits != self._weight.bits:
            dense = source.dequantize() if isinstance(source, QuantizedRows) else source
            source = quantize_int8(dense)
        self._weight.write(self._start, source)
