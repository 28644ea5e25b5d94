"""From what ``--model`` says to the files of a model."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minivllm.errors import ModelLoadError
from minivllm.models.config import ModelConfig
from minivllm.weights import embedded, hub
from minivllm.weights.checkpoint import read_json, weight_files

# A leading dot, slash or tilde is a path; a model's file is one too.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.gguf)")
_GGUF_HINT = (
    "a GGUF file is fetched with `hf download {} FILE.gguf`, and loaded by giving its path to --model"
)


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model whose configuration has been read and checked; the weights haven't been opened yet."""

    name: str
    """What ``--model`` said, or the embedded model's name."""
    path: Path
    """A folder with ``config.json``, or a GGUF file: tokenizer and chat template are there too."""
    kind: Literal["safetensors", "gguf", "dummy"]
    """Where the weights come from; dummy: from nowhere, they are random."""
    config: ModelConfig


def resolve_model(model: str | None, *, revision: str | None = None, load_format: str = "auto") -> ModelFiles:
    """Find a model, fetching what isn't there yet.

    Args:
        model: a folder with ``config.json`` and safetensors, a GGUF file, a folder with one GGUF
            file, a Hugging Face id, or None for the embedded model. A path that exists is a path.
        revision: branch, tag or commit of a Hugging Face id.
        load_format: ``"auto"``, ``"safetensors"``, ``"gguf"`` or ``"dummy"`` (the configuration is
            enough; weights are neither needed nor fetched).

    Raises:
        ModelLoadError: not found, not complete, or of a kind that isn't supported.
    """
    if model is not None and not (path := Path(model).expanduser()).exists():
        if _HUB_ID.fullmatch(model):
            return _from_hub(model, revision, load_format)
        raise _not_found(model, path)
    if revision is not None:
        raise ModelLoadError(
            f"--revision is for Hugging Face ids alone, got {revision} for {model or 'none'}"
        )
    if model is None:
        return _from_gguf(embedded.NAME, embedded.embedded_model_path(), load_format)
    if path.is_file():
        return _from_gguf(model, path, load_format)
    return _from_folder(model, path, load_format)


def _from_hub(repo_id: str, revision: str | None, load_format: str) -> ModelFiles:
    if load_format == "gguf":
        raise ModelLoadError(f"--load-format gguf needs a path: {_GGUF_HINT.format(repo_id)}")
    folder = hub.download_config(repo_id, revision)
    if not (folder / "config.json").is_file() or _is_stub(folder):
        raise ModelLoadError(
            f"{repo_id} has no config.json that describes a model; {_GGUF_HINT.format(repo_id)}"
        )
    _read_config(folder)  # refuses what isn't supported before gigabytes are fetched
    if load_format != "dummy":
        folder = hub.download_weights(repo_id, folder)
    return _from_folder(repo_id, folder, load_format)


def _from_folder(name: str, folder: Path, load_format: str) -> ModelFiles:
    has_config = (folder / "config.json").is_file()
    gguf_files = sorted(folder.glob("*.gguf"))
    has_safetensors = any(folder.glob("*.safetensors"))
    has_enough = has_safetensors or load_format == "dummy"
    is_complete = has_config and has_enough and not (gguf_files and _is_stub(folder))
    if load_format == "gguf" or (gguf_files and not is_complete and load_format != "safetensors"):
        if len(gguf_files) != 1:
            names = ", ".join(file.name for file in gguf_files[:5]) or "none"
            raise ModelLoadError(
                f"{folder}: {len(gguf_files)} GGUF files ({names}); give the path of the one to load"
            )
        return _from_gguf(name, gguf_files[0], load_format)
    if not has_config:
        raise ModelLoadError(f"{folder}: a model's folder holds a config.json or a GGUF file, found neither")
    config = _read_config(folder)
    if load_format == "dummy":
        return ModelFiles(name=name, path=folder, kind="dummy", config=config)
    weight_files(folder)  # refuses an incomplete checkpoint now and not when it is loaded
    return ModelFiles(name=name, path=folder, kind="safetensors", config=config)


def _from_gguf(name: str, path: Path, load_format: str) -> ModelFiles:
    if path.suffix != ".gguf":
        raise ModelLoadError(f"{path}: a model is a .gguf file, or a folder with config.json and safetensors")
    if load_format == "safetensors":
        raise ModelLoadError(f"{path}: --load-format safetensors needs a folder with safetensors files")
    from minivllm.weights.gguf import open_gguf

    config = ModelConfig.from_gguf(open_gguf(path))
    return ModelFiles(name=name, path=path, kind="dummy" if load_format == "dummy" else "gguf", config=config)


def _is_stub(folder: Path) -> bool:
    """Whether config.json names a family and nothing else: repositories of GGUF files have such ones."""
    return read_json(folder / "config.json").keys() <= {"model_type"}


def _read_config(folder: Path) -> ModelConfig:
    path, generation_path = folder / "config.json", folder / "generation_config.json"
    generation_config = read_json(generation_path) if generation_path.is_file() else None
    return ModelConfig.from_hf(read_json(path), generation_config, source=str(path))


def _not_found(model: str, path: Path) -> ModelLoadError:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, names, n=1)
    hint = f"; the nearest is {path.parent / nearest[0]}" if nearest else ""
    return ModelLoadError(
        f"--model {model}: no such file or folder{hint} (a Hugging Face id has the form organisation/name)"
    )
