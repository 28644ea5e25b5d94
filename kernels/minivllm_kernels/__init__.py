"""The engine's compute kernels: one interface, several backends, one test suite over all of them."""

from minivllm_kernels.interface import BLOCK_SIZE, KernelBackend, available_backends, get_backend
from minivllm_kernels.layers import DecoderWeights, KVPool, LayerCache, LayerWeights, Weight
from minivllm_kernels.packed import PackedRows, PackedWeight, QuantizedRows, quantize_int8

__all__ = [
    "BLOCK_SIZE",
    "DecoderWeights",
    "KVPool",
    "KernelBackend",
    "LayerCache",
    "LayerWeights",
    "PackedRows",
    "PackedWeight",
    "QuantizedRows",
    "Weight",
    "available_backends",
    "get_backend",
    "quantize_int8",
]
