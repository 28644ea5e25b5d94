"""The most that the device does: a large copy, a large matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu_parts.setting import Row, Setting
from benchmarks.gpu_parts.timing import time_calls


def copy_bandwidth(setting: Setting) -> float:
    """Bytes read and written per second by a large copy on the device."""
    rate = 2 * setting.sizes.copy_bytes / _copy_seconds(setting)
    if setting.device == "cuda":
        torch.cuda.empty_cache()  # an engine takes what is free
    return rate


def _copy_seconds(setting: Setting) -> float:
    device = torch.device(setting.device)
    source = torch.ones(setting.sizes.copy_bytes // 4, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    return time_calls([copy], device, setting.sizes.measure_seconds, as_graph=False).median


@torch.inference_mode()
def ceilings(setting: Setting) -> Iterator[tuple[str, Row]]:
    """Copy bandwidth, and the rate of a product of random square matrices."""
    rate = copy_bandwidth(setting)
    yield "copy", {"bytes": setting.sizes.copy_bytes, "gb_per_s": rate / 1e9}
    device, size = torch.device(setting.device), setting.sizes.product_size
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    timing = time_calls([partial(torch.mm, a, b)], device, setting.sizes.measure_seconds, as_graph=False)
    yield (
        "product",
        {
            "size": size,
            "dtype": str(dtype).removeprefix("torch."),
            "tflop_per_s": 2 * size**3 / timing.median / 1e12,
        },
    )
