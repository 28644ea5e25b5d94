"""The buddy system (Knowlton 1965; Knuth, TAOCP volume 1, section 2.5): chunks of powers of two.

A chunk of ``2^k`` units begins at a multiple of ``2^k``. It can be split into two halves, buddies of each
other, which join again when both are free; no other neighbours ever join. A pool of any size is the chunks
of its binary digits, largest first: 11 units are chunks of 8, 2 and 1.
"""

from __future__ import annotations


def next_power_of_two(number: int) -> int:
    """The least power of two that isn't below ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()


class BuddyAllocator:
    """Hands out chunks of units from 0 to ``num_units - 1``: the lowest of the smallest that will do."""

    def __init__(self, num_units: int) -> None:
        self._free: list[set[int]] = [set() for _ in range(num_units.bit_length())]
        """Starts of the free chunks, by order: a chunk of order k has ``2^k`` units."""
        self._order_of: dict[int, int] = {}
        """Of each chunk handed out, by its start."""
        start = 0
        for order in reversed(range(num_units.bit_length())):
            if num_units >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    def allocate(self, num_units: int) -> range | None:
        """A chunk of at least so many units (1 or more), or None where there is none."""
        order = (num_units - 1).bit_length()
        source = next((k for k in range(order, len(self._free)) if self._free[k]), None)
        if source is None:
            return None
        start = min(self._free[source])
        self._free[source].remove(start)
        for k in reversed(range(order, source)):  # keep the lower half
            self._free[k].add(start + (1 << k))
        self._order_of[start] = order
        return range(start, start + (1 << order))

    def free(self, start: int) -> None:
        """Take back the chunk that begins at ``start``; join it with its buddy as long as that is free."""
        order = self._order_of.pop(start)
        while start ^ (1 << order) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)

    def free_chunks(self) -> list[range]:
        """The chunks that are free, in order of their starts."""
        chunks = [
            range(start, start + (1 << order)) for order, starts in enumerate(self._free) for start in starts
        ]
        return sorted(chunks, key=lambda chunk: chunk.start)
