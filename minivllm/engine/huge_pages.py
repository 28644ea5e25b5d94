"""The KV pool's memory on a CPU: in huge pages, and provided before it is needed."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress

import torch

_PIECE = 4 * 2**20
"""Bytes at a time: some milliseconds."""


def empty_in_huge_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of any values, in pages of 2 MiB where Linux gives them to those who ask.

    Attention reads 2 KiB here and 2 KiB there: in small pages, each read waits for an address to be looked
    up first. Memory is taken as it is touched, in either case, a page at a time: see :func:`touch`.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    num_values = torch.Size(shape).numel()
    memory = mmap.mmap(-1, num_values * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=num_values).view(shape)


def touch(tensor: torch.Tensor) -> Iterator[int]:
    """Have the system provide a contiguous CPU tensor's memory, a piece with each step; values stay.

    Whoever writes to a page first waits until the system has cleared it: for KV blocks, in the middle of
    somebody's prompt. And what isn't there to be had shows now, not under load.

    Yields:
        the bytes that are left.
    """
    pages = tensor.view(-1).view(torch.uint8)
    for start in range(0, len(pages), _PIECE):
        pages[start : start + _PIECE : mmap.PAGESIZE].add_(0)
        yield len(pages) - start
