"""The header of a GGUF file: metadata, and where the tensors lie.

A file is a magic number, a version, two counts, that many key/value pairs of metadata, that many
tensor infos (name, dimensions, type, offset), padding to an alignment, and the tensors' data
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Versions 2 and 3, little-endian.

``gguf.GGUFReader`` isn't used: it makes an array object for every value of every array (three
seconds for a vocabulary of 49k, memory without bound for a hostile count) and doesn't check
offsets against the file. The tensor types and their block sizes are the ``gguf`` package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from minivllm.errors import ModelLoadError

_VERSIONS = (2, 3)
_MAX_ENTRIES = 100_000  # metadata pairs, or tensors: far above any model, and a bound on memory
_MAX_NAME = 1024
_MAX_DIMS = 4  # GGML_MAX_DIMS
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9  # value types; the rest are scalars:
_SCALARS = {
    value_type: struct.Struct("<" + code)
    for value_type, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies in the file, checked against its length."""

    name: str
    """GGUF's, such as ``blk.0.attn_q.weight``."""
    type: str
    """One of ``F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K``."""
    shape: tuple[int, ...]
    """In PyTorch's order (a matrix: rows, columns); GGUF writes it the other way round."""
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


def read_header(path: Path, data: mmap.mmap) -> tuple[Mapping[str, Any], dict[str, GGUFTensor]]:
    """Metadata by key, and tensors by name, in file order.

    A metadata value is an ``int``, ``float``, ``bool``, ``str`` or a list of them, decoded when it
    is first asked for; that raises :class:`ModelLoadError` where a string isn't UTF-8.

    Raises:
        ModelLoadError: malformed, truncated or not supported; the message names the file and what is wrong.
    """
    cursor = _Cursor(path, data)
    num_tensors, num_pairs = _read_counts(cursor)
    metadata = _Metadata(cursor, num_pairs)
    return metadata, _read_tensors(cursor, num_tensors, _alignment(path, metadata))


class _Cursor:
    """Reads forward through a file. Every size and count passes :meth:`skip`, which checks it."""

    def __init__(self, path: Path, data: mmap.mmap, position: int = 0) -> None:
        self.path = path
        self.data = data
        self.position = position

    def skip(self, num_bytes: int) -> int:
        """Step over ``num_bytes`` and return where they start."""
        start = self.position
        if num_bytes > len(self.data) - start:
            raise ModelLoadError(
                f"{self.path}: malformed or truncated GGUF file: {num_bytes} bytes are needed "
                f"at offset {start}, but the file has {len(self.data)}"
            )
        self.position = start + num_bytes
        return start

    def scalar(self, kind: struct.Struct) -> Any:
        """One number or bool."""
        return kind.unpack_from(self.data, self.skip(kind.size))[0]

    def string(self) -> str:
        """A 64-bit length and that many bytes of UTF-8."""
        length = self.scalar(_U64)
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise ModelLoadError(f"{self.path}: the string at offset {start} isn't UTF-8") from None

    def name(self) -> str:
        """A key or a tensor's name: a string of sensible length, so that messages can show it."""
        start = self.position
        name = self.string()
        if len(name) > _MAX_NAME:
            raise ModelLoadError(
                f"{self.path}: malformed GGUF file: a name of {len(name)} characters at offset {start}"
            )
        return name

    def value(self, value_type: int) -> Any:
        """A metadata value."""
        if value_type == _STRING:
            return self.string()
        if value_type != _ARRAY:
            return self.scalar(_SCALARS[value_type])
        item_type, count = self.scalar(_U32), self.scalar(_U64)
        if item_type == _STRING:
            return [self.string() for _ in range(count)]
        code = _SCALARS[item_type].format[1:]
        start = self.skip(count * _SCALARS[item_type].size)
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def skip_value(self, value_type: int) -> None:
        """Step over a metadata value: :meth:`value` at the same place can't meet a bad type or size."""
        item_type, count = value_type, 1
        if value_type == _ARRAY:
            item_type, count = self.scalar(_U32), self.scalar(_U64)
        if item_type == _STRING:
            for _ in range(count):
                self.skip(self.scalar(_U64))
        elif item_type in _SCALARS:
            self.skip(count * _SCALARS[item_type].size)
        else:
            kind = "an array of arrays" if item_type == _ARRAY else f"unknown value type {item_type}"
            raise ModelLoadError(f"{self.path}: {kind} before offset {self.position}")


class _Metadata(Mapping[str, Any]):
    """Keys to values; a value is decoded when it is first asked for, which most never are."""

    def __init__(self, cursor: _Cursor, num_pairs: int) -> None:
        self._path, self._data = cursor.path, cursor.data
        self._places: dict[str, tuple[int, int]] = {}  # key → value type, offset
        self._values: dict[str, Any] = {}
        for _ in range(num_pairs):
            key, value_type = cursor.name(), cursor.scalar(_U32)
            if key in self._places:
                raise ModelLoadError(f"{cursor.path}: metadata key {key!r} appears twice")
            self._places[key] = (value_type, cursor.position)
            cursor.skip_value(value_type)

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            value_type, offset = self._places[key]
            self._values[key] = _Cursor(self._path, self._data, offset).value(value_type)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; the numbers of tensors and of metadata pairs."""
    start = cursor.skip(4)
    if cursor.data[start : start + 4] != b"GGUF":
        raise ModelLoadError(f"{cursor.path}: not a GGUF file: it doesn't begin with 'GGUF'")
    version = cursor.scalar(_U32)
    if version & 0xFFFF == 0:
        raise ModelLoadError(f"{cursor.path}: big-endian GGUF files aren't supported")
    if version not in _VERSIONS:
        raise ModelLoadError(f"{cursor.path}: GGUF version must be 2 or 3, got {version}")
    counts = cursor.scalar(_U64), cursor.scalar(_U64)
    for count, what in zip(counts, ("tensors", "metadata pairs"), strict=True):
        if count > _MAX_ENTRIES:
            raise ModelLoadError(
                f"{cursor.path}: malformed GGUF file: at most {_MAX_ENTRIES} {what} can be, got {count}"
            )
    return counts


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ModelLoadError(f"{path}: general.alignment must be a power of two, got {alignment!r}")
    return alignment


def _read_tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, GGUFTensor]:
    infos: list[tuple[str, str, tuple[int, ...], int, int]] = []
    for _ in range(num_tensors):
        name, num_dims = cursor.name(), cursor.scalar(_U32)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ModelLoadError(
                f"{cursor.path}: tensor {name} must have 1 to {_MAX_DIMS} dimensions, got {num_dims}"
            )
        dims = tuple(cursor.scalar(_U64) for _ in range(num_dims))
        type_name, block_size, block_bytes = _tensor_type(cursor.path, name, cursor.scalar(_U32))
        if min(dims) == 0 or dims[0] % block_size:
            raise ModelLoadError(
                f"{cursor.path}: tensor {name} must have dimensions above 0, and the first a multiple of "
                f"{block_size} for {type_name}, got {dims}"
            )
        num_bytes = math.prod(dims) // block_size * block_bytes
        infos.append((name, type_name, dims[::-1], cursor.scalar(_U64), num_bytes))

    data_start = cursor.position + -cursor.position % alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, type_name, shape, offset, num_bytes in infos:
        if name in tensors:
            raise ModelLoadError(f"{cursor.path}: tensor {name} appears twice")
        start, file_bytes = data_start + offset, len(cursor.data)
        if start + num_bytes > file_bytes:
            raise ModelLoadError(
                f"{cursor.path}: malformed or truncated GGUF file: tensor {name} takes {num_bytes} bytes "
                f"at offset {start}, but the file has {file_bytes}"
            )
        tensors[name] = GGUFTensor(name, type_name, shape, start, num_bytes)
    return tensors


def _tensor_type(path: Path, tensor_name: str, type_id: int) -> tuple[str, int, int]:
    """Name, values in a block, and bytes of a block."""
    try:
        tensor_type = gguf.GGMLQuantizationType(type_id)
    except ValueError:
        raise ModelLoadError(f"{path}: tensor {tensor_name} is of unknown type {type_id}") from None
    if tensor_type.name not in _TENSOR_TYPES:
        raise ModelLoadError(
            f"{path}: tensor {tensor_name} is {tensor_type.name}; supported are {', '.join(_TENSOR_TYPES)}"
        )
    return tensor_type.name, *gguf.GGML_QUANT_SIZES[tensor_type]
