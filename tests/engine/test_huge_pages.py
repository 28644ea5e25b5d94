from __future__ import annotations

import mmap

import pytest
import torch

from minivllm.engine.huge_pages import empty_in_huge_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_them", [True, False])
def test_it_is_a_tensor_like_any_other(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, has_them: bool
) -> None:
    """Also where the system has no huge pages; and it outlives the mapping's name."""
    if not has_them:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    first, second = (empty_in_huge_pages(3, 1000, 700, dtype=dtype) for _ in range(2))
    assert first.shape == (3, 1000, 700)
    assert first.dtype == dtype
    assert first.is_contiguous()
    first.fill_(1.0)
    second.fill_(2.0)
    assert (first == 1.0).all()
    assert (second == 2.0).all()
