"""GGUF files: their metadata, and their tensors dequantised under Hugging Face's names."""

from __future__ import annotations

import math
import mmap
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from minivllm.errors import ModelLoadError
from minivllm.weights.gguf_header import GGUFTensor, read_header

if TYPE_CHECKING:
    import torch
    from minivllm_kernels import QuantizedRows

    from minivllm.models.config import ModelConfig

_PLAIN_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}  # numpy has no bfloat16
_PACKED_BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q8_0": 8}  # types that the kernels can keep as they are
_ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies, not a weight

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_HF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """A memory-mapped GGUF file; see :func:`open_gguf`."""

    metadata: Mapping[str, Any]
    """Plain Python values, arrays as lists. One is decoded, and checked to be UTF-8, when first asked for."""
    tensors: Mapping[str, GGUFTensor]
    """Where each tensor lies, by GGUF's name, in file order."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        self.metadata, self.tensors = read_header(path, data)
        self._weights: dict[str, GGUFTensor] = {}  # by Hugging Face name
        for tensor in self.tensors.values():
            name = _hf_name(tensor.name)
            if name in self._weights:
                raise ModelLoadError(f"{path}: two tensors stand for {name}")
            if tensor.name != _ROPE_FACTORS:
                self._weights[name] = tensor

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by its Hugging Face name; one that no Llama has keeps GGUF's name."""
        return {name: tensor.shape for name, tensor in self._weights.items()}

    @property
    def rope_factors(self) -> tuple[float, ...]:
        """Divisors of the rotary frequencies, ``head_dim / 2`` of them; empty where the file has none."""
        tensor = self.tensors.get(_ROPE_FACTORS)
        if tensor is None:
            return ()
        if tensor.type != "F32":
            raise ModelLoadError(f"{self.path}: {_ROPE_FACTORS} must be F32, got {tensor.type}")
        return tuple(self._bytes(tensor).view(np.float32).tolist())

    def packed_bits(self, name: str) -> int | None:
        """Bits in which the kernels can keep a weight, by Hugging Face name; None if it is not quantised."""
        tensor = self._weights.get(name)
        if tensor is None or tensor.type in _PLAIN_TYPES:
            return None
        return _PACKED_BITS.get(tensor.type, 8)  # the rest are rounded anew

    def iter_tensors(
        self, config: ModelConfig, packed: frozenset[str] = frozenset()
    ) -> Iterator[tuple[str, torch.Tensor | QuantizedRows]]:
        """Every weight as (Hugging Face name, tensor), in file order.

        F16 and BF16 keep their type; quantised ones become float32, except that those whose names
        are in ``packed`` keep their bits where the kernels have such blocks. ``config`` tells the
        numbers of heads, which un-permuting the query and key rows takes. Threads read a few tensors
        ahead of the caller and no more: memory stays flat.
        """
        num_threads = min(4, max(1, (os.cpu_count() or 1) - 1))  # a core is left for the caller
        pending: deque[tuple[str, Future[torch.Tensor | QuantizedRows]]] = deque()
        with ThreadPoolExecutor(num_threads) as pool:
            try:
                for name, tensor in self._weights.items():
                    pending.append((name, pool.submit(self._load, tensor, config, name in packed)))
                    if len(pending) > num_threads:
                        ready, future = pending.popleft()
                        yield ready, future.result()
                for ready, future in pending:
                    yield ready, future.result()
            finally:  # also when the caller stops half-way
                pool.shutdown(cancel_futures=True)

    def _load(self, tensor: GGUFTensor, config: ModelConfig, is_packed: bool) -> torch.Tensor | QuantizedRows:
        import torch

        is_plain = tensor.type in _PLAIN_TYPES
        if is_plain:
            rows = self._bytes(tensor).view(_PLAIN_TYPES[tensor.type]).reshape(tensor.shape)
        else:
            rows = self._bytes(tensor).reshape(math.prod(tensor.shape[:-1]), -1)
        if ".attn_q." in tensor.name:
            rows = self._unpermute(tensor, rows, config.num_heads)
        elif ".attn_k." in tensor.name:
            rows = self._unpermute(tensor, rows, config.num_kv_heads)
        if is_packed and tensor.type in _PACKED_BITS:
            return _quantized_rows(rows, tensor.type)
        if not is_plain:
            return torch.from_numpy(_dequantize(rows, tensor.type).reshape(tensor.shape))
        values = torch.from_numpy(rows.copy())  # the mapping is read-only, a tensor is not
        return values.view(torch.bfloat16) if tensor.type == "BF16" else values

    def _bytes(self, tensor: GGUFTensor) -> NDArray[Any]:
        return np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)

    def _unpermute(self, tensor: GGUFTensor, rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
        """Undo what llama.cpp's converter does to the query and key rows of Llama models.

        It makes rotary pairs (i, i + head_dim/2) neighbours (2i, 2i + 1): ``permute`` in
        https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py. Whole rows move, so
        quantised ones can move before they are expanded.
        """
        if len(rows) % (2 * num_heads):
            raise ModelLoadError(
                f"{self.path}: {tensor.name} has {len(rows)} rows, which {num_heads} heads can't share evenly"
            )
        pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)


def open_gguf(path: str | Path) -> GGUFFile:
    """Map a GGUF file and read its header; the same file is opened once.

    Raises:
        ModelLoadError: the file can't be read, or its header is malformed, truncated or of a kind
            that isn't supported; the message names the file and what is wrong.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise ModelLoadError(f"{path}: can't be read: {error.strerror}") from None
    return _open(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _open(path: Path, mtime_ns: int, size: int) -> GGUFFile:
    # Time and size are part of the key: a file that was replaced is another file.
    if size == 0:
        raise ModelLoadError(f"{path}: not a GGUF file: it is empty")
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelLoadError(f"{path}: can't be read: {error.strerror}") from None
    return GGUFFile(path, data)


def _hf_name(name: str) -> str:
    """``blk.0.attn_q.weight`` → ``model.layers.0.self_attn.q_proj.weight``; others stay as they are."""
    stem, _, suffix = name.rpartition(".")
    if suffix in ("weight", "bias"):
        if stem in _HF_NAMES:
            return f"{_HF_NAMES[stem]}.{suffix}"
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match is not None and match[2] in _HF_LAYER_NAMES:
            return f"model.layers.{match[1]}.{_HF_LAYER_NAMES[match[2]]}.{suffix}"
    return name


def _quantized_rows(rows: NDArray[np.uint8], tensor_type: str) -> QuantizedRows:
    """Blocks as llama.cpp lays them out (ggml-common.h), as the kernels' groups of 32 columns."""
    import torch
    from minivllm_kernels import QuantizedRows

    if tensor_type == "Q4_K":
        return _q4_k_rows(rows)
    bits = _PACKED_BITS[tensor_type]
    num_numbers = 2 if tensor_type == "Q4_1" else 1  # d, perhaps m, then values
    num_bytes = 2 * num_numbers + 4 * bits
    blocks = torch.from_numpy(rows.reshape(len(rows), -1, num_bytes).copy())
    numbers = blocks[..., : 2 * num_numbers].contiguous().view(torch.float16)
    values, scales = blocks[..., 2 * num_numbers :].contiguous(), numbers[..., 0]
    columns = 32 * values.shape[1]
    if bits == 8:
        return QuantizedRows(8, columns, values.view(torch.int8), scales, None)
    mins = numbers[..., 1] if num_numbers == 2 else -8 * scales
    return QuantizedRows(4, columns, values, scales, mins)


def _q4_k_rows(rows: NDArray[np.uint8]) -> QuantizedRows:
    """Q4_K: eight groups share d and dmin, and have a scale and a minimum of 6 bits each.

    Their products are rounded to float16, which is within 2^-11 of them.
    """
    import torch
    from minivllm_kernels import QuantizedRows

    blocks = rows.reshape(-1, 144)  # d, dmin, the 6-bit numbers in 12 bytes, values
    numbers = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    scales, mins = gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16].copy())
    # 32 bytes are two groups: the low nibbles one, the high nibbles the next.
    pairs = blocks[:, 16:].reshape(-1, 1, 32)
    values = np.concatenate((pairs & 15, pairs >> 4), axis=1)
    values = values[..., :16] | values[..., 16:] << 4
    scales_and_mins = [
        torch.from_numpy((factor * six_bits).reshape(len(rows), -1)).half()
        for factor, six_bits in ((numbers[:, :1], scales), (-numbers[:, 1:], mins))
    ]
    packed = torch.from_numpy(values.reshape(len(rows), -1, 16))
    return QuantizedRows(4, 32 * packed.shape[1], packed, *scales_and_mins)


def _dequantize(rows: NDArray[np.uint8], tensor_type: str) -> NDArray[np.float32]:
    # A block's values depend on that block alone, and gguf works on 16 rows at a time: a few long
    # rows made of many short ones (576 columns, say) take a sixth of the time.
    while len(rows) % 2 == 0 and rows.shape[-1] < 32768:
        rows = rows.reshape(len(rows) // 2, -1)
    values: NDArray[np.float32] = gguf.dequantize(rows, gguf.GGMLQuantizationType[tensor_type])
    return values
