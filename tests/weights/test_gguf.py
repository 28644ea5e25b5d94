from __future__ import annotations

import os
import random
import struct
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from minivllm_kernels import QuantizedRows

from minivllm.errors import ModelLoadError
from minivllm.models.config import ModelConfig
from minivllm.weights.gguf import GGUFFile, open_gguf
from tests.weights.tiny_models import (
    TINY_METADATA,
    gguf_data,
    gguf_name,
    tiny_tensors,
    write_gguf,
    write_small_gguf,
    write_tiny_gguf,
)

F32 = GGMLQuantizationType.F32
LARGEST_ERROR = {  # of standard normal values: half a quantisation step, generously
    "F32": 0.0,
    "F16": 2e-3,
    "BF16": 2e-2,
    "Q8_0": 3e-2,
    "Q5_0": 0.3,
    "Q5_1": 0.3,
    "Q4_0": 0.6,
    "Q4_1": 0.5,
}
K_TYPES = ["Q4_K", "Q5_K", "Q6_K"]  # the gguf package reads them but doesn't write them


def load(path: Path) -> dict[str, torch.Tensor]:
    file = open_gguf(path)
    return dict(file.iter_tensors(ModelConfig.from_gguf(file)))


def random_blocks(rows: int, columns: int, tensor_type: GGMLQuantizationType) -> np.ndarray:
    """Rows of random blocks; every float16 in them is finite."""
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (rows, columns // block_size, block_bytes), dtype=np.uint8)
    scales = rng.standard_normal((rows, columns // block_size, 2)).astype(np.float16).view(np.uint8)
    if tensor_type == GGMLQuantizationType.Q6_K:
        data[..., -2:] = scales[..., :2]
    else:
        data[..., :4] = scales
    return data.reshape(rows, -1)


# --- what a file says -------------------------------------------------------------------------


def test_metadata_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    extra: dict[str, Any] = {
        "a.bool": True,
        "a.string": "naïve 🦙",
        "floats": [0.5, -1.25],
        "ints": [-3, 7],
        "flags": [True, False],
        "strings": ["", "é", "b"],
    }
    path = write_tiny_gguf(tmp_path / "tiny.gguf", metadata=extra)
    expected = {
        name: field.contents()
        for name, field in gguf.GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }
    metadata = open_gguf(path).metadata
    assert len(expected) == len(TINY_METADATA) + len(extra) + 1  # general.architecture
    assert dict(metadata) == expected
    assert list(metadata) == list(expected)
    assert "absent" not in metadata
    assert metadata.get("absent") is None


def test_every_scalar_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "scalars.gguf", "llama")
    values = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 1.5, "float64": 0.1, "bool": False,
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = open_gguf(tmp_path / "scalars.gguf").metadata
    assert {kind: metadata[f"a.{kind}"] for kind in values} == values


def test_a_file_is_opened_once_and_again_when_it_was_replaced(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf")
    first = open_gguf(path)
    assert open_gguf(str(path)) is first
    write_tiny_gguf(tmp_path / "other.gguf", tiny_tensors(head=False)).replace(path)
    assert "output.weight" in first.tensors
    assert "output.weight" not in open_gguf(path).tensors


def test_a_file_of_the_same_size_is_another_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", metadata={"a.number": 1})
    assert open_gguf(path).metadata["a.number"] == 1
    before = path.stat()
    write_tiny_gguf(tmp_path / "other.gguf", metadata={"a.number": 2}).replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert path.stat().st_size == before.st_size
    assert open_gguf(path).metadata["a.number"] == 2


# --- tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", LARGEST_ERROR)
def test_tensors_come_back_as_they_were(tmp_path: Path, type_name: str) -> None:
    tensor_type = GGMLQuantizationType[type_name]
    original = tiny_tensors(bias=True)
    loaded = load(write_tiny_gguf(tmp_path / "tiny.gguf", original, matrix_type=tensor_type))
    assert loaded.keys() == original.keys()
    for name, values in original.items():
        stored_type = tensor_type if values.ndim == 2 else F32
        expected_dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored_type.name, torch.float32)
        assert loaded[name].dtype == expected_dtype, name
        assert loaded[name].shape == values.shape, name
        # Blocks lie along rows and the permutation moves whole rows: quantising commutes with it.
        exact = gguf.dequantize(gguf.quantize(values, stored_type), stored_type)
        np.testing.assert_array_equal(loaded[name].float().numpy(), exact, err_msg=name)
        assert np.abs(loaded[name].float().numpy() - values).max() <= LARGEST_ERROR[stored_type.name], name


@pytest.mark.parametrize("type_name", K_TYPES)
@pytest.mark.parametrize("rows", [1, 3, 64, 100])
def test_k_types_expand_as_the_gguf_package_says(tmp_path: Path, type_name: str, rows: int) -> None:
    tensor_type = GGMLQuantizationType[type_name]
    blocks = random_blocks(rows, 512, tensor_type)
    path = write_gguf(tmp_path / "k.gguf", {}, {"blk.0.ffn_down.weight": (blocks, tensor_type)})
    loaded = dict(open_gguf(path).iter_tensors(SimpleNamespace()))["model.layers.0.mlp.down_proj.weight"]
    expected = gguf.dequantize(blocks, tensor_type)
    assert loaded.shape == (rows, 512)
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 1
    np.testing.assert_array_equal(loaded.numpy(), expected)


@pytest.mark.parametrize(("type_name", "bits"), [("Q8_0", 8), ("Q4_0", 4), ("Q4_1", 4), ("Q4_K", 4)])
@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.0.attn_q.weight"])
def test_quantised_rows_keep_their_bits(tmp_path: Path, name: str, type_name: str, bits: int) -> None:
    """Scales of Q4_K, products of two numbers, are rounded to float16; nothing else is."""
    tensor_type = GGMLQuantizationType[type_name]
    if type_name == "Q4_K":
        blocks = random_blocks(12, 512, tensor_type)
    else:
        values = np.random.default_rng(2).standard_normal((12, 512), dtype=np.float32)
        blocks = gguf.quantize(values, tensor_type)
    file = open_gguf(write_gguf(tmp_path / "q.gguf", {}, {name: (blocks, tensor_type)}))
    [hf_name] = file.shapes
    assert file.packed_bits(hf_name) == bits
    [(_, dense)] = file.iter_tensors(SimpleNamespace(num_heads=3))
    [(_, rows)] = file.iter_tensors(SimpleNamespace(num_heads=3), packed=frozenset(file.shapes))
    assert isinstance(rows, QuantizedRows)
    assert isinstance(dense, torch.Tensor)
    assert (rows.bits, rows.shape) == (bits, (12, 512))
    error = (rows.dequantize() - dense).abs().max()
    if type_name == "Q4_K":
        numbers = blocks.reshape(-1, 144)[:, :4].copy().view(np.float16).astype(np.float64)
        assert error <= 2.0**-11 * (np.abs(numbers) @ [63 * 15, 63]).max()
    else:
        assert error <= 2.0**-22 * dense.abs().max()


def test_quantised_vectors(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 96, dtype=np.float32)
    tensor_type = GGMLQuantizationType.Q8_0
    data = {
        name: (gguf.quantize(values, tensor_type), tensor_type)
        for name in ("output_norm.weight", "blk.0.attn_k.bias")
    }
    tensors = open_gguf(write_gguf(tmp_path / "v.gguf", {}, data)).iter_tensors(
        SimpleNamespace(num_kv_heads=2)
    )
    name, norm = next(tensors)
    assert name == "model.norm.weight"
    np.testing.assert_allclose(norm.numpy(), values, atol=0.005)
    with pytest.raises(ModelLoadError, match=r"attn_k\.bias has 1 rows"):  # values of a block can't move
        next(tensors)


def test_names_and_row_order_are_transformers_own(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_tiny_gguf(tmp_path / "tiny.gguf", matrix_type=GGMLQuantizationType.Q8_0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    loaded = load(path)
    assert loaded.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name


def test_tensors_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    for tensor in load(path).values():
        tensor.zero_()
    assert all(tensor.any() for tensor in load(path).values())


def test_iteration_can_be_abandoned(tmp_path: Path) -> None:
    file = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"))
    tensors = file.iter_tensors(ModelConfig.from_gguf(file))
    name, _ = next(tensors)
    tensors.close()  # type: ignore[attr-defined]
    assert name == next(iter(file.shapes))


def test_rope_factors_are_no_weight(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    data = {gguf_name(name): (gguf_data(name, values), F32) for name, values in tiny_tensors().items()}
    path = write_gguf(tmp_path / "rope.gguf", TINY_METADATA, data | {"rope_freqs.weight": (factors, F32)})
    file = open_gguf(path)
    assert file.rope_factors == tuple(factors.tolist())
    assert file.shapes.keys() == tiny_tensors().keys()
    assert load(path).keys() == tiny_tensors().keys()


def test_unknown_names_are_kept(tmp_path: Path) -> None:
    names = ["blk.0.attn_q_norm.weight", "blk.x.attn_q.weight", "mm.0.bias", "stray"]
    data = {name: (np.ones(4, np.float32), F32) for name in names}
    assert list(open_gguf(write_gguf(tmp_path / "stray.gguf", {}, data)).shapes) == names


def test_rows_that_heads_cannot_share(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q.gguf", {}, {"blk.0.attn_q.weight": (np.ones((6, 4), np.float32), F32)})
    with pytest.raises(ModelLoadError, match=r"blk\.0\.attn_q\.weight has 6 rows, which 4 heads"):
        list(open_gguf(path).iter_tensors(SimpleNamespace(num_heads=4)))


# --- malformed files --------------------------------------------------------------------------


def header(*, version: int = 3, num_tensors: int = 0, num_pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def tensor_info(name: str, dims: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def pair(key: str, type_id: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_id) + value


MALFORMED = {
    "empty": (b"", "is empty"),
    "magic": (b"GGML" + bytes(100), "doesn't begin with 'GGUF'"),
    "short": (b"GG", "truncated"),
    "version": (header(version=1), "version must be 2 or 3, got 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (header(num_tensors=2**64 - 1), "at most 100000 tensors"),
    "pair count": (header(num_pairs=2**63), "at most 100000 metadata pairs"),
    "too few pairs": (header(num_pairs=3), "truncated"),
    "string length": (header(num_pairs=1) + struct.pack("<Q", 2**64 - 1), "truncated"),
    "long name": (header(num_pairs=1) + text("k" * 2000), "a name of 2000 characters"),
    "key encoding": (header(num_pairs=1) + text(b"\xff\xfe") + bytes(16), "isn't UTF-8"),
    "value type": (header(num_pairs=1) + pair("k", 99, bytes(8)), "unknown value type 99"),
    "array of arrays": (header(num_pairs=1) + pair("k", 9, struct.pack("<IQ", 9, 1)), "array of arrays"),
    "array type": (header(num_pairs=1) + pair("k", 9, struct.pack("<IQ", 77, 1)), "unknown value type 77"),
    "array length": (header(num_pairs=1) + pair("k", 9, struct.pack("<IQ", 12, 2**61)), "truncated"),
    "string array length": (header(num_pairs=1) + pair("k", 9, struct.pack("<IQ", 8, 2**60)), "truncated"),
    "twice": (header(num_pairs=2) + pair("k", 7, b"\1") * 2, "metadata key 'k' appears twice"),
    "alignment": (
        header(num_pairs=1) + pair("general.alignment", 4, struct.pack("<I", 24)),
        "general.alignment must be a power of two, got 24",
    ),
    "no alignment": (
        header(num_pairs=1) + pair("general.alignment", 4, struct.pack("<I", 0)),
        "general.alignment must be a power of two, got 0",
    ),
    "alignment type": (
        header(num_pairs=1) + pair("general.alignment", 8, text("32")),
        "general.alignment must be a power of two, got '32'",
    ),
    "huge alignment": (
        header(num_tensors=1, num_pairs=1)
        + pair("general.alignment", 10, struct.pack("<Q", 2**63))
        + tensor_info("t", (1,))
        + bytes(64),
        "tensor t takes 4 bytes",
    ),
    "no dimensions": (header(num_tensors=1) + tensor_info("t", ()), "1 to 4 dimensions, got 0"),
    "dimensions": (header(num_tensors=1) + text("t") + struct.pack("<I", 2**32 - 1), "1 to 4 dimensions"),
    "zero": (header(num_tensors=1) + tensor_info("t", (8, 0)) + bytes(64), "dimensions above 0"),
    "overflow": (header(num_tensors=1) + tensor_info("t", (2**32, 2**32)) + bytes(64), "tensor t takes"),
    "wrapped": (header(num_tensors=1) + tensor_info("t", (2**63, 2**63, 4)) + bytes(64), "tensor t takes"),
    "unknown type": (header(num_tensors=1) + tensor_info("t", (8,), type_id=12345), "of unknown type 12345"),
    "unsupported": (
        header(num_tensors=1) + tensor_info("t", (256,), type_id=10) + bytes(200),
        "tensor t is Q2_K; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K",
    ),
    "partial block": (header(num_tensors=1) + tensor_info("t", (48,), 8) + bytes(99), "multiple of 32"),
    "past the end": (header(num_tensors=1) + tensor_info("t", (1000,)) + bytes(99), "takes 4000 bytes"),
    "offset": (header(num_tensors=1) + tensor_info("t", (1,), 0, 2**64 - 64) + bytes(99), "tensor t takes"),
    "same tensor": (header(num_tensors=2) + tensor_info("t", (1,)) * 2 + bytes(64), "tensor t appears twice"),
    "same weight": (
        header(num_tensors=2)
        + tensor_info("output_norm.weight", (1,))
        + tensor_info("model.norm.weight", (1,))
        + bytes(64),
        "two tensors stand for model.norm.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_files_say_what_is_wrong(tmp_path: Path, fault: str) -> None:
    data, message = MALFORMED[fault]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_bad_string_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(num_pairs=1) + pair("k", 8, text(b"\xc3(")))
    with pytest.raises(ModelLoadError, match="isn't UTF-8"):
        open_gguf(path).metadata["k"]


def test_absent_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"absent\.gguf: can't be read: No such file"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelLoadError, match="can't be read"):
        open_gguf(tmp_path)


@pytest.mark.parametrize("item", ["scalars", "strings"])
def test_a_huge_array_costs_no_memory_until_it_is_read(tmp_path: Path, item: str) -> None:
    count = 1_000_000 if item == "scalars" else 125_000
    type_id = 0 if item == "scalars" else 8
    path = tmp_path / "huge.gguf"
    path.write_bytes(
        header(num_pairs=1) + pair("k", 9, struct.pack("<IQ", type_id, count)) + bytes(1_000_000)
    )
    tracemalloc.start()
    file = open_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert len(file.metadata["k"]) == count


def read_everything(path: Path) -> GGUFFile:
    file = open_gguf(path)
    dict(file.metadata)
    list(file.iter_tensors(ModelConfig.from_gguf(file)))
    return file


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_small_gguf(tmp_path_factory.mktemp("small") / "small.gguf")
    read_everything(path)
    return path.read_bytes()


def test_truncation_anywhere_is_a_model_load_error(tmp_path: Path, small_file: bytes) -> None:
    # The writer pads the last tensor: what lies behind it may be cut without loss.
    last_byte = len(small_file) - 4 * 4 - 16
    lengths = random.Random(0).sample(range(last_byte), 300)
    for length in lengths:
        path = tmp_path / f"{length}.gguf"
        path.write_bytes(small_file[:length])
        with pytest.raises(ModelLoadError):
            open_gguf(path)


def test_flipped_bytes_load_or_are_a_model_load_error(tmp_path: Path, small_file: bytes) -> None:
    rng = random.Random(0)
    (tmp_path / "whole.gguf").write_bytes(small_file)
    header_size = min(tensor.offset for tensor in open_gguf(tmp_path / "whole.gguf").tensors.values())
    outcomes = {"loaded": 0, "refused": 0}
    for trial in range(1500):
        data = bytearray(small_file)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(header_size)] = rng.randrange(256)
        path = tmp_path / f"{trial}.gguf"
        path.write_bytes(data)
        try:
            read_everything(path)
            outcomes["loaded"] += 1
        except ModelLoadError:
            outcomes["refused"] += 1
        path.unlink()
    assert min(outcomes.values()) > 100, outcomes  # both happen, and nothing else does
