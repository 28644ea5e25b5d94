"""Which files of a folder make up its model: JSON, and safetensors with or without an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minivllm.errors import ModelLoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises :class:`ModelLoadError` where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor names to file names, from the index of a sharded checkpoint; None where there is no index.

    Raises:
        ModelLoadError: malformed, or a name that isn't a plain file name: an index must not lead
            out of its folder.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{path}: weight_map must map tensor names to file names")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ModelLoadError(f"{path}: weight_map: {name} must have a plain file name, got {file_name!r}")
        if not file_name.endswith(".safetensors"):
            raise ModelLoadError(
                f"{path}: weight_map: {name} must be in a .safetensors file, got {file_name}"
            )
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in ``folder``: what the index names, or the only one there is.

    Raises:
        ModelLoadError: there are none, a shard is missing, or several and no index.
    """
    index = read_index(folder)
    if index is not None:
        files = [folder / name for name in sorted(set(index.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelLoadError(
                f"{folder / INDEX_FILE}: {len(missing)} of the {len(files)} files that it names are missing: "
                f"{', '.join(missing[:5])}"
            )
        return files
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise ModelLoadError(f"{folder}: {len(files)} safetensors files ({names}) but no {INDEX_FILE}")
    if not files:
        pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES)
        found = f"only {', '.join(pickles[:5])}" if pickles else "none"
        raise ModelLoadError(
            f"{folder}: weights must be .safetensors files, found {found}. PyTorch's .bin, .pt and .pth "
            "files are pickles, which can run any code when they are loaded: convert them to safetensors "
            "first (with transformers: from_pretrained, then save_pretrained)"
        )
    return files
