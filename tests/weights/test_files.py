from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from minivllm.errors import ModelLoadError
from minivllm.models.config import ModelConfig
from minivllm.weights import embedded
from minivllm.weights.files import resolve_model
from minivllm.weights.gguf import open_gguf
from tests.weights.tiny_models import write_tiny_gguf


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "my-model"))


def test_a_folder(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    files = resolve_model(str(folder))
    assert (files.name, files.path, files.kind) == (str(folder), folder, "safetensors")
    assert files.config.vocab_size == 64
    assert files.config.eos_token_ids == (3, 4, 2)
    assert resolve_model(str(folder), load_format="safetensors") == files


def test_the_name_is_what_was_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve_model("my-model").name == "my-model"
    monkeypatch.setenv("HOME", str(folder.parent))
    files = resolve_model("~/my-model")
    assert (files.name, files.path) == ("~/my-model", folder)


def test_a_gguf_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    files = resolve_model(str(path))
    assert (files.name, files.path, files.kind) == (str(path), path, "gguf")
    assert files.config == ModelConfig.from_gguf(open_gguf(path))
    assert resolve_model(str(path), load_format="gguf") == files
    with pytest.raises(ModelLoadError, match="--load-format safetensors needs a folder"):
        resolve_model(str(path), load_format="safetensors")


def test_a_folder_with_gguf_files(tmp_path: Path, folder: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    path = write_tiny_gguf(only / "a.gguf")
    assert resolve_model(str(only)).path == path
    shutil.copy(folder / "config.json", only)  # as some repositories of GGUF files have it
    assert resolve_model(str(only)).kind == "gguf"
    with pytest.raises(ModelLoadError, match=r"weights must be \.safetensors files"):
        resolve_model(str(only), load_format="safetensors")
    shutil.copy(path, only / "b.gguf")
    with pytest.raises(ModelLoadError, match=r"2 GGUF files \(a\.gguf, b\.gguf\); give the path"):
        resolve_model(str(only))


def test_a_config_that_names_a_family_alone_is_none(tmp_path: Path) -> None:
    """As repositories of GGUF files have it."""
    path = write_tiny_gguf(tmp_path / "a.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for load_format in ("auto", "dummy"):
        assert resolve_model(str(tmp_path), load_format=load_format).path == path


def test_safetensors_beside_gguf(folder: Path) -> None:
    path = write_tiny_gguf(folder / "tiny.gguf")
    assert resolve_model(str(folder)).kind == "safetensors"
    files = resolve_model(str(folder), load_format="gguf")
    assert (files.kind, files.path) == ("gguf", path)
    path.unlink()
    with pytest.raises(ModelLoadError, match=r"0 GGUF files \(none\)"):
        resolve_model(str(folder), load_format="gguf")


def test_dummy_needs_a_config_alone(folder: Path, tmp_path: Path) -> None:
    config = resolve_model(str(folder)).config
    (folder / "model.safetensors").unlink()
    files = resolve_model(str(folder), load_format="dummy")
    assert (files.kind, files.path, files.config) == ("dummy", folder, config)
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    files = resolve_model(str(path), load_format="dummy")
    assert (files.kind, files.config.vocab_size) == ("dummy", 48)


def test_nothing_given_is_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(embedded, "embedded_model_path", lambda: path)
    files = resolve_model(None)
    assert (files.name, files.path, files.kind) == ("SmolLM2-135M-Instruct", path, "gguf")


def test_what_does_not_exist(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"no such file or folder; the nearest is {folder} "):
        resolve_model(str(folder.parent / "my-modle"))
    with pytest.raises(ModelLoadError, match=r"no such file or folder \(a Hugging Face id has the form"):
        resolve_model("./nowhere/at/all")
    for path in ("llama", "org/name/more", "org/model.gguf", "/org/name", "../name"):
        with pytest.raises(ModelLoadError, match=f"--model {path}: no such file or folder"):
            resolve_model(path)


def test_revision_is_for_the_hub(folder: Path) -> None:
    for model in (str(folder), None):
        with pytest.raises(ModelLoadError, match="--revision is for Hugging Face ids alone, got v2"):
            resolve_model(model, revision="v2")


def test_a_file_that_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: a model is a \.gguf file, or a folder"):
        resolve_model(str(folder / "model.safetensors"))


def test_pickles_are_refused_and_why(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"must be \.safetensors files, found none\."):
        resolve_model(str(folder))
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"found only pytorch_model\.bin\..* can run any code") as caught:
        resolve_model(str(folder))
    assert "convert them to safetensors" in str(caught.value)


def test_broken_config_files(folder: Path) -> None:
    path = folder / "config.json"
    for text, message in [
        ("{", "malformed JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ("[" * 100_000, "malformed JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "malformed JSON"),
        ("\xff", "malformed JSON"),
        ("{}", "isn't supported"),
    ]:
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ModelLoadError, match=message) as caught:
            resolve_model(str(folder))
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(ModelLoadError, match=r"holds a config\.json or a GGUF file, found neither"):
        resolve_model(str(folder))


def test_a_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("no")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json: malformed JSON"):
        resolve_model(str(folder))


def test_files_without_an_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert resolve_model(str(folder)).kind == "safetensors"
    shutil.copy(folder / "weights.safetensors", folder / "copy.safetensors")
    with pytest.raises(ModelLoadError, match=r"2 safetensors files \(copy\.safetensors, weights"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map must map tensor names to file names"),
        ({"weight_map": []}, "weight_map must map"),
        ({"weight_map": {}}, "weight_map must map"),
        ({"weight_map": {"a": 1}}, "a must have a plain file name, got 1"),
        ({"weight_map": {"a": "../secret.safetensors"}}, "a must have a plain file name"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "a must have a plain file name"),
        (
            {"weight_map": {"a": "pytorch_model.bin"}},
            "must be in a .safetensors file, got pytorch_model",
        ),
        (
            {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}},
            "2 of the 2 files that it names are missing: 1.s",
        ),
    ],
)
def test_a_broken_index(folder: Path, index: object, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=message) as caught:
        resolve_model(str(folder))
    assert "model.safetensors.index.json" in str(caught.value)
