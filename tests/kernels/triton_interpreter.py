"""Triton 3.6's interpreter, with what our kernels need and it lacks."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


@cache
def patch_interpreter() -> None:
    """Loop bounds that a kernel computed, and products of bfloat16."""
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
