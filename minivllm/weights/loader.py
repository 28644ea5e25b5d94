"""A model's weights, tensor by tensor, strictly: what the model expects and nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from minivllm_kernels import QuantizedRows
from safetensors import SafetensorError, safe_open

from minivllm.errors import ModelLoadError
from minivllm.weights.checkpoint import INDEX_FILE, read_index, weight_files
from minivllm.weights.files import ModelFiles

_DTYPES = ("F32", "F16", "BF16")  # safetensors' names
_DUMMY_STD = 0.02
_DUMMY_PERIOD = 1_048_573  # prime, so that no two rows of a matrix are alike
_MAX_LISTED = 5


def check_and_iterate(
    files: ModelFiles, expected: Mapping[str, tuple[int, ...]], packed: frozenset[str] = frozenset()
) -> Iterator[tuple[str, torch.Tensor | QuantizedRows]]:
    """Yield each tensor of ``expected`` (Hugging Face name → shape) exactly once, on the CPU, in file order.

    There are ``len(expected)`` of them, for a progress bar.
    Names and shapes are compared when this is called, from the files' headers alone: a wrong
    checkpoint fails before any data is read. Tensors are float32, float16 or bfloat16, as stored;
    quantised and dummy ones are float32, except that a quantised one in ``packed`` stays so. Two kinds
    of extra tensor are skipped: ``lm_head.weight`` where the embeddings are tied, and the
    ``rotary_emb.inv_freq`` that old checkpoints carry.

    Raises:
        ModelLoadError: missing, extra or misshapen tensors, with their names and shapes; or files
            that can't be read.
    """
    if files.kind == "dummy":
        return ((name, _random(name, shape)) for name, shape in expected.items())
    found = _shapes(files)
    extra = [name for name in found if name not in expected and not _is_ignored(name, files)]
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in found]
    misshapen = [
        f"{name} (expected {shape}, found {found[name]})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = [("missing", missing), ("extra", extra), ("of the wrong shape", misshapen)]
    if any(names for _, names in faults):
        listed = "; ".join(f"{len(names)} {fault}: {_list(names)}" for fault, names in faults if names)
        raise ModelLoadError(f"{files.path}: the tensors don't fit the configuration: {listed}")
    return ((name, tensor) for name, tensor in iter_weights(files, packed) if name in expected)


def iter_weights(
    files: ModelFiles, packed: frozenset[str] = frozenset()
) -> Iterator[tuple[str, torch.Tensor | QuantizedRows]]:
    """Every tensor in the files, as (Hugging Face name, tensor on the CPU), unchecked and in file order.

    Those in ``packed`` stay quantised where the file has them so.

    Raises:
        ModelLoadError: a file can't be read, or there are none (dummy).
    """
    if files.kind == "dummy":
        raise ModelLoadError(
            "dummy weights are made from the shapes that a model expects, not read from files"
        )
    if files.kind == "gguf":
        from minivllm.weights.gguf import open_gguf

        return open_gguf(files.path).iter_tensors(files.config, packed)
    return _iter_safetensors(files.path)


def stored_bits(files: ModelFiles, name: str) -> int | None:
    """In how many bits the kernels could keep a tensor of a quantised file, 4 or 8; None for all others."""
    if files.kind != "gguf":
        return None
    from minivllm.weights.gguf import open_gguf

    return open_gguf(files.path).packed_bits(name)


def _shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    if files.kind == "gguf":
        from minivllm.weights.gguf import open_gguf

        return open_gguf(files.path).shapes
    return _safetensors_shapes(files.path)


def _safetensors_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """From the headers; checks dtypes, and the index if there is one."""
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, str] = {}  # tensor name → file name
    for path in weight_files(folder):
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(name)
                if name in places:
                    raise ModelLoadError(f"{path}: tensor {name} is in {places[name]} too")
                if header.get_dtype() not in _DTYPES:
                    raise ModelLoadError(
                        f"{path}: tensor {name} is {header.get_dtype()}; supported are {', '.join(_DTYPES)}"
                    )
                shapes[name], places[name] = tuple(header.get_shape()), path.name
    for name, file_name in (read_index(folder) or {}).items():
        if places.get(name) != file_name:
            raise ModelLoadError(f"{folder / INDEX_FILE}: {name} should be in {file_name}, which lacks it")
    return shapes


def _iter_safetensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in weight_files(folder):
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: not a readable safetensors file: {error}") from None


def _is_ignored(name: str, files: ModelFiles) -> bool:
    is_tied_head = name == "lm_head.weight" and files.config.tie_word_embeddings
    return is_tied_head or name.endswith(".rotary_emb.inv_freq")


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal with std 0.02, norms around 1; float32. The same for the same name, wherever it is made.

    A stretch of one periodic sequence, since drawing billions of numbers would take minutes.
    """
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _DUMMY_PERIOD
    end = start + math.prod(shape)
    values = _dummy_values().repeat(-(-end // _DUMMY_PERIOD))[start:end].view(shape)
    return values + 1 if name.endswith("norm.weight") else values


@cache
def _dummy_values() -> torch.Tensor:
    return torch.randn(_DUMMY_PERIOD, generator=torch.Generator().manual_seed(0)) * _DUMMY_STD


def _list(names: list[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
