"""Memory in huge pages, for what is read here and there."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch


def empty_in_huge_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of any values, in pages of 2 MiB where Linux gives them to those who ask.

    Attention reads 2 KiB here and 2 KiB there: in small pages, each read waits for an address to be looked
    up first. Memory is taken as it is touched, in either case, a page at a time.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    num_values = torch.Size(shape).numel()
    memory = mmap.mmap(-1, num_values * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=num_values).view(shape)
