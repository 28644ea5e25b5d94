"""Triton's interpreter, made to convert between floating dtypes as a GPU does.

Version 3.6 cuts float32 off on the way to bfloat16, and loses a carry on the way to float8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}


def round_as_the_hardware_does() -> None:
    """Round to nearest, ties to even, by torch's own conversions."""
    from triton.runtime import interpreter

    interpreter._convert_float = _convert


def _convert(values: np.ndarray, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> np.ndarray:
    """Both arrays hold bits; NumPy knows neither bfloat16 nor float8."""
    bits = torch.from_numpy(np.ascontiguousarray(values).view(f"i{values.itemsize}").reshape(-1))
    converted = bits.view(_TORCH_DTYPES[from_dtype.name]).to(_TORCH_DTYPES[to_dtype.name])
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[converted.element_size()]
    result = converted.view(integer).numpy()
    return result.view(f"u{result.itemsize}").reshape(values.shape)
