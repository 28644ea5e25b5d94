"""The engine's compute kernels: one interface, several backends, one test suite over all of them."""

from minivllm_kernels.interface import BLOCK_SIZE, KernelBackend, get_backend

__all__ = ["BLOCK_SIZE", "KernelBackend", "get_backend"]
