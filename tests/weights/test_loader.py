from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from minivllm.config import EngineConfig
from minivllm.engine.startup import build_engine
from minivllm.errors import ModelLoadError
from minivllm.weights.files import resolve_model
from minivllm.weights.loader import check_and_iterate, iter_weights
from tests.weights.tiny_models import save_tiny_llama, tiny_tensors, write_tiny_gguf

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same model in several files."""
    folder = save_tiny_llama(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of the folder."""
    from transformers import LlamaForCausalLM

    return dict(LlamaForCausalLM.from_pretrained(folder, dtype="auto").named_parameters())


def assert_loads(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    loaded = list(check_and_iterate(resolve_model(str(folder)), shapes_of(expected)))
    assert len(loaded) == len(expected)  # each exactly once
    for name, tensor in loaded:
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_weights_that_make_nothing_finite_are_refused(folder: Path) -> None:
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    edit(folder / "model.safetensors", model__norm__weight=norm * torch.nan)
    config = EngineConfig(model=str(folder), device="cpu", kv_cache_memory=2**22)
    with pytest.raises(ModelLoadError, match=r"logits that aren't finite numbers: the file is damaged"):
        build_engine(config, resolve_model(str(folder)))


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    """Add, replace or (None) remove tensors; ``__`` in a name stands for a dot."""
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def test_one_file(folder: Path) -> None:
    assert_loads(folder, parameters(folder))


def test_several_files(sharded: Path) -> None:
    assert_loads(sharded, parameters(sharded))


def test_only_what_the_index_names(sharded: Path) -> None:
    save_file({"tok_embeddings.weight": torch.ones(2)}, sharded / "consolidated.safetensors")
    assert_loads(sharded, parameters(sharded))


def test_tied_bias_and_bfloat16(tmp_path: Path) -> None:
    folder = save_tiny_llama(
        tmp_path / "model", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, dtype="bfloat16"
    )
    assert resolve_model(str(folder)).config.dtype == "bfloat16"
    assert_loads(folder, parameters(folder))


def test_gguf(tmp_path: Path) -> None:
    original = {name: torch.from_numpy(values) for name, values in tiny_tensors().items()}
    files = resolve_model(str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    loaded = dict(check_and_iterate(files, shapes_of(original)))
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], original[name]) for name in original)


def test_gguf_is_checked_too(tmp_path: Path) -> None:
    original = {name: torch.from_numpy(values) for name, values in tiny_tensors().items()}
    files = resolve_model(str(write_tiny_gguf(tmp_path / "t.gguf", matrix_type=GGMLQuantizationType.Q8_0)))
    expected = shapes_of(original) | {"lm_head.weight": (49, 256)}
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight \(expected \(49, 256\), found \(48, 256\)\)"):
        check_and_iterate(files, expected)
    del expected["lm_head.weight"]
    with pytest.raises(ModelLoadError, match=r"1 extra: lm_head\.weight"):
        check_and_iterate(files, expected)


def test_every_fault_is_named_before_data_is_read(folder: Path) -> None:
    expected = shapes_of(parameters(folder))
    edit(
        folder / "model.safetensors",
        model__norm__weight=torch.ones(31),
        lm_head__weight=None,
        model__layers__0__self_attn__q_proj__bias=torch.ones(32),
    )
    with pytest.raises(ModelLoadError) as caught:
        check_and_iterate(resolve_model(str(folder)), expected)  # not iterated
    assert str(caught.value) == (
        f"{folder}: the tensors don't fit the configuration: 1 missing: lm_head.weight (64, 32); "
        "1 extra: model.layers.0.self_attn.q_proj.bias; "
        "1 of the wrong shape: model.norm.weight (expected (32,), found (31,))"
    )


def test_many_faults_are_counted_and_five_listed(folder: Path) -> None:
    files = resolve_model(str(folder))
    missing = {f"absent.{i}": (1,) for i in range(9)}
    with pytest.raises(ModelLoadError, match=r"9 missing: absent\.0 .*absent\.4 \(1,\), \.\.\.") as caught:
        check_and_iterate(files, shapes_of(parameters(folder)) | missing)
    assert "absent.5" not in str(caught.value)


def test_extras_that_mean_nothing_are_skipped(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    expected = parameters(folder)
    inv_freq = {f"model__layers__{i}__self_attn__rotary_emb__inv_freq": torch.ones(4) for i in range(2)}
    edit(folder / "model.safetensors", lm_head__weight=torch.ones(64, 32), **inv_freq)
    assert len(list(iter_weights(resolve_model(str(folder))))) == len(expected) + 3
    assert_loads(folder, expected)


def test_an_untied_head_is_not_skipped(folder: Path) -> None:
    expected = shapes_of(parameters(folder))
    del expected["lm_head.weight"]
    with pytest.raises(ModelLoadError, match=r"1 extra: lm_head\.weight"):
        check_and_iterate(resolve_model(str(folder)), expected)


def test_dtypes_that_are_no_weights(folder: Path) -> None:
    expected = shapes_of(parameters(folder))
    edit(folder / "model.safetensors", model__norm__weight=torch.ones(32, dtype=torch.int8))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight is I8; supported are F32, F16, BF16"):
        check_and_iterate(resolve_model(str(folder)), expected)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_safetensors(folder: Path, length: int) -> None:
    expected = shapes_of(parameters(folder))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a readable safetensors file"):
        check_and_iterate(resolve_model(str(folder)), expected)
    with pytest.raises(ModelLoadError, match="not a readable safetensors file"):
        list(iter_weights(resolve_model(str(folder))))


def test_an_index_that_lies(sharded: Path) -> None:
    expected = shapes_of(parameters(sharded))
    index = json.loads((sharded / INDEX).read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    for changes, message in [
        ({moved: last}, f"{moved} should be in {last}, which lacks it"),
        ({"absent.weight": first}, f"absent.weight should be in {first}, which lacks it"),
    ]:
        wrong = index | {"weight_map": index["weight_map"] | changes}
        (sharded / INDEX).write_text(json.dumps(wrong))
        with pytest.raises(ModelLoadError, match=message):
            check_and_iterate(resolve_model(str(sharded)), expected)


def test_a_tensor_in_two_files(sharded: Path) -> None:
    expected = shapes_of(parameters(sharded))
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    edit(last, **{name: tensor})
    with pytest.raises(ModelLoadError, match=f"tensor {name} is in {first.name} too"):
        check_and_iterate(resolve_model(str(sharded)), expected)


def test_dummy_weights(tiny_llama: Path) -> None:
    files = resolve_model(str(tiny_llama), load_format="dummy")
    expected = {
        "model.embed_tokens.weight": (500, 40),
        "model.layers.0.input_layernorm.weight": (4000,),
        "model.layers.0.mlp.up_proj.weight": (200, 100),
        "model.layers.1.mlp.up_proj.weight": (200, 100),
    }
    first = dict(check_and_iterate(files, expected))
    again = dict(check_and_iterate(files, dict(reversed(expected.items()))))
    assert shapes_of(first) == expected
    assert all(torch.equal(first[name], again[name]) for name in expected)  # whatever the order
    assert not torch.equal(*(first[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2)))
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1)
        assert tensor.mean().item() == pytest.approx(1.0 if "norm" in name else 0.0, abs=0.002)
    with pytest.raises(ModelLoadError, match="dummy weights are made"):
        iter_weights(files)


def test_one_file_is_open_at_a_time(sharded: Path) -> None:
    expected = shapes_of(parameters(sharded))
    tensors = check_and_iterate(resolve_model(str(sharded)), expected)
    max(sharded.glob("*.safetensors")).write_bytes(b"spoilt after the check")
    next(tensors)
    with pytest.raises(ModelLoadError, match="not a readable safetensors file"):
        list(tensors)
