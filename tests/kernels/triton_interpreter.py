"""The interpreter of Triton 3.6 and 3.7, with what our kernels need and it lacks."""

from __future__ import annotations

from functools import cache
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


@cache
def patch_interpreter() -> None:
    """Loop bounds that a kernel computed, products of bfloat16, and conversions that round as a GPU does."""
    import triton.language as tl
    from triton.runtime import interpreter

    module: Any = interpreter
    patch_tensor, create_dot = module._patch_lang_tensor, module.InterpreterBuilder.create_dot

    def patch_index(tensor: Any, scope: Any) -> None:
        # It takes int() of an array of one element, which NumPy 2.4 no longer does.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widen(handle: Any) -> Any:
        # It keeps bfloat16 as integers, and would multiply these.
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return module.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *others)

    module._patch_lang_tensor = patch_index
    module.InterpreterBuilder.create_dot = dot
    # It cuts float32 off on the way to bfloat16, and loses a carry on the way to float8.
    module._convert_float = _round_to_nearest


def _round_to_nearest(values: np.ndarray, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> np.ndarray:
    """Ties to even, by torch's own conversions. Both arrays hold bits: NumPy has no bfloat16 or float8."""
    bits = torch.from_numpy(np.ascontiguousarray(values).view(f"i{values.itemsize}").reshape(-1))
    converted = bits.view(_TORCH_DTYPES[from_dtype.name]).to(_TORCH_DTYPES[to_dtype.name])
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[converted.element_size()]
    result = converted.view(integer).numpy()
    return result.view(f"u{result.itemsize}").reshape(values.shape)
