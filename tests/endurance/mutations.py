"""Random changes to bytes and texts: what a broken disk, a cut download or an attacker would do."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

_EDGES = [
    0,
    1,
    2,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def mutate_bytes(data: bytes, rng: random.Random, *, end: int | None = None) -> bytes:
    """1 to 8 changes in the first ``end`` bytes: flipped, cut, doubled, moved, or numbers at their limits."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
        limit = max(min(len(changed), end or len(changed)), 1)
        at = rng.randrange(limit)
        kind = rng.randrange(7)
        if not changed:
            changed = bytearray(rng.randbytes(rng.randrange(1, 40)))
        elif kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            del changed[at : at + rng.choice([1, 1, 4, 8, 100, 10_000])]
        elif kind == 3:
            changed[at:at] = rng.randbytes(rng.choice([1, 4, 8, 100]))
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.choice([1, 8, 50, 500])]
        elif kind == 5:
            del changed[at:]
        else:
            size = rng.choice(["B", "I", "Q"])
            number = rng.choice(_EDGES) % 2 ** (8 * struct.calcsize("<" + size))
            packed = struct.pack(rng.choice("<>") + size, number)
            changed[at : at + len(packed)] = packed
    return bytes(changed)


def mutate_text(text: str, rng: random.Random, words: Sequence[str]) -> str:
    """1 to 8 changes: pieces deleted, doubled, moved or replaced, and ``words`` put in."""
    for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
        at = rng.randrange(len(text) + 1)
        size = rng.choice([1, 1, 3, 10, 50])
        piece = text[at : at + size]
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:at] + text[at + size :]
        elif kind == 1:
            text = text[:at] + piece + text[at:]
        elif kind == 2:
            to = rng.randrange(len(text) + 1)
            text = text[:to] + piece + text[to:]
        elif kind == 3:
            text = text[:at] + rng.choice(words) + text[at:]
        elif kind == 4:
            text = text[:at] + rng.choice(words) + text[at + size :]
        else:
            text = (
                text[:at]
                + chr(rng.choice([0, 9, 34, 92, 127, 0x7B, 0x7D, 0x2028, 0xD7FF, 0x1F999]))
                + text[at:]
            )
    return text
