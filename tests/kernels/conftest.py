"""The fixtures that run every kernel test on every backend of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from minivllm_kernels import KernelBackend, available_backends, get_backend

from tests.kernels.triton_interpreter import patch_interpreter

BACKENDS = [(name, "cpu") for name in available_backends("cpu")]
"""Name of each backend that this machine can run, and the type of device that its tensors live on."""
if torch.cuda.is_available():
    BACKENDS += [(name, "cuda") for name in available_backends("cuda")]


@dataclass(frozen=True)
class Backend:
    """A backend's kernels, and where to put the tensors for them."""

    kernels: KernelBackend
    device: torch.device

    @property
    def is_cpp(self) -> bool:
        """Its activations are float32, and packed weights stay packed."""
        return self.kernels.keeps_packed

    @property
    def is_slow(self) -> bool:
        """Triton's interpreter: give it small tensors."""
        return self.kernels.name == "triton" and self.device.type == "cpu"

    def size(self, full: int, *, slow: int) -> int:
        """A test's size: the full one, except in the interpreter."""
        return slow if self.is_slow else full


@pytest.fixture(params=BACKENDS, ids=lambda pair: "-".join(pair))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name, device_type = request.param
    backend = Backend(get_backend(name, device_type), torch.device(device_type))
    if not backend.is_slow:
        yield backend
        return
    patch_interpreter()
    with np.errstate(all="ignore"):  # it computes with NumPy, on masked lanes too
        yield backend


@pytest.fixture
def rng() -> np.random.Generator:
    """Other numbers in each run. A failure shows the seed; MINIVLLM_TEST_SEED repeats it."""
    seed = int(os.environ.get("MINIVLLM_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
    print(f"MINIVLLM_TEST_SEED={seed} repeats this")
    return np.random.default_rng(seed)
