"""Copies between the host and the device that don't make one wait for the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def to_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A small array on the device. On a CPU it shares the array's memory.

    CUDA copies beside other work only from pinned memory, which torch's allocator keeps for the next time.
    """
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
    """Begin a copy to the host; calling the result waits for it, and for nothing that was launched later."""
    if tensor.device.type == "cpu":
        return tensor.numpy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
    is_there.record()

    def wait() -> npt.NDArray[np.generic]:
        is_there.synchronize()
        return copy.numpy()

    return wait
