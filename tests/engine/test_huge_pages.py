from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from minivllm.engine.huge_pages import empty_in_huge_pages, touch


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


def resident(tensor: torch.Tensor) -> int:
    """Bytes of the mappings that hold the tensor, as far as the system has provided them."""
    start, total, is_ours = tensor.data_ptr(), 0, False
    end = start + tensor.numel() * tensor.element_size()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name:
            first, last = (int(part, 16) for part in name.split("-"))
            is_ours = first < end and start < last
        elif name == "Rss:" and is_ours:
            total += 1024 * int(rest[0])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads resident memory from /proc")
def test_touching_takes_the_memory_and_leaves_its_values() -> None:
    size = 9 * 2**20 + 4096  # a few pieces, and a part of one
    tensor = empty_in_huge_pages(size // 2, dtype=torch.float16)
    places = torch.tensor([0, 2**21, size // 2 - 1])
    tensor[places] = torch.tensor([1.5, -0.0, float("nan")], dtype=torch.float16)
    before, bits = resident(tensor), tensor[places].view(torch.int16)
    left = list(touch(tensor))
    assert left[0] == size
    assert left == sorted(left, reverse=True)
    assert before < size
    assert resident(tensor) >= size
    assert torch.equal(tensor[places].view(torch.int16), bits)
