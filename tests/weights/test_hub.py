from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from minivllm.errors import ModelLoadError
from minivllm.weights import hub
from minivllm.weights.files import resolve_model
from tests.weights.tiny_models import save_tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Stands in for ``snapshot_download``: copies what the patterns select out of a folder."""

    def __init__(self, repo: Path, cache: Path) -> None:
        self.repo = repo
        self.snapshot = cache / "models--org--name" / "snapshots" / COMMIT
        self.calls: list[tuple[str, str | None]] = []

    def __call__(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: Any
    ) -> str:
        self.calls.append((repo_id, revision))
        names = [str(path.relative_to(self.repo)) for path in self.repo.rglob("*") if path.is_file()]
        selected = huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in selected:
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repo / name, self.snapshot / name)
        return str(self.snapshot)

    def fetched(self) -> set[str]:
        return {str(path.relative_to(self.snapshot)) for path in self.snapshot.rglob("*") if path.is_file()}


@pytest.fixture
def repo(tiny_llama: Path, tmp_path: Path) -> Path:
    """A repository with everything that real ones have."""
    repo = Path(shutil.copytree(tiny_llama, tmp_path / "repo"))
    for name in [
        "README.md",
        "chat_template.jinja",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "onnx/model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "training_args.bin",
    ]:
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("{}")
    return repo


@pytest.fixture
def fake_hub(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(repo, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo_id, *, revision: [])
    return fake


NEEDED = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}


def test_only_what_is_needed_is_fetched(fake_hub: FakeHub) -> None:
    files = resolve_model("org/name", revision="v1.0")
    assert (files.name, files.path, files.kind) == ("org/name", fake_hub.snapshot, "safetensors")
    assert fake_hub.fetched() == NEEDED | {"model.safetensors"}
    # The weights are those of the commit that the configuration was read from.
    assert fake_hub.calls == [("org/name", "v1.0"), ("org/name", COMMIT)]


def test_shards_are_those_of_the_index(fake_hub: FakeHub, repo: Path) -> None:
    (repo / "model.safetensors").unlink()
    save_tiny_llama(repo, max_shard_size="20KB")
    index = json.loads((repo / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    (repo / "model-of-another-day.safetensors").write_text("")
    assert len(shards) > 1
    resolve_model("org/name", revision="v1.0")
    assert fake_hub.fetched() == NEEDED | shards | {"model.safetensors.index.json"}
    assert fake_hub.calls == [("org/name", "v1.0"), ("org/name", COMMIT)]


def test_dummy_fetches_no_weights(fake_hub: FakeHub) -> None:
    assert resolve_model("org/name", load_format="dummy").kind == "dummy"
    assert fake_hub.fetched() == NEEDED


def test_an_unsupported_model_is_refused_before_fetching_weights(fake_hub: FakeHub, repo: Path) -> None:
    (repo / "config.json").write_text('{"architectures": ["FooForCausalLM"], "model_type": "foo"}')
    with pytest.raises(ModelLoadError, match="FooForCausalLM"):
        resolve_model("org/name")
    assert fake_hub.fetched() == NEEDED


def test_a_repository_of_pickles(fake_hub: FakeHub, repo: Path) -> None:
    (repo / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"must be \.safetensors files"):
        resolve_model("org/name")


def test_a_cache_without_weights_while_the_hub_is_away(
    fake_hub: FakeHub, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repo_id: str, *, revision: str) -> list[str]:
        raise httpx.ConnectError("refused")

    (repo / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        ModelLoadError, match=r"^org/name isn't complete in the cache, .* be reached: ConnectError: refused"
    ):
        resolve_model("org/name")


def test_a_repository_of_gguf_files(fake_hub: FakeHub, repo: Path) -> None:
    hint = r"has no config\.json that describes a model; .*`hf download org/name FILE\.gguf`"
    (repo / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelLoadError, match=hint):
        resolve_model("org/name")
    (repo / "config.json").unlink()
    (fake_hub.snapshot / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=hint):
        resolve_model("org/name")
    with pytest.raises(ModelLoadError, match=r"--load-format gguf needs a path"):
        resolve_model("org/name", load_format="gguf")


def test_a_folder_here_comes_first(
    fake_hub: FakeHub, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name").path == Path("org/name")
    assert fake_hub.calls == []


# --- what can go wrong ------------------------------------------------------------------------


def http_error(kind: Any) -> Any:
    """An error of the hub, made without knowing which HTTP client's response it wants."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(errors.GatedRepoError),
            "org/name is gated: accept its licence on https://huggingface.co/org/name, then log in with "
            "`hf auth login` or set HF_TOKEN",
        ),
        (http_error(errors.RepositoryNotFoundError), "org/name is neither a folder here nor a model on the"),
        (http_error(errors.RevisionNotFoundError), "org/name has no revision v9"),
        (
            errors.LocalEntryNotFoundError("Cannot find"),
            "isn't complete in the cache, .* be reached: Cannot find",
        ),
        (errors.HFValidationError("no double dots"), "org/name is no Hugging Face id: no double dots"),
        (
            httpx.ConnectError("refused"),
            r"\(revision v9\) couldn't be fetched: ConnectError: refused",
        ),
        (OSError(28, "No space left on device"), "couldn't be fetched: OSError: .*No space left on device"),
    ],
)
def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelLoadError, match=message):
        resolve_model("org/name", revision="v9")


# --- the real huggingface_hub, without a network ----------------------------------------------


@pytest.fixture
def hf_home(tiny_llama: Path, tmp_path: Path) -> Path:
    """A cache as the hub's library lays it out."""
    repo = tmp_path / "hf" / "hub" / "models--org--name"
    shutil.copytree(tiny_llama, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hf"


RESOLVE = """
from minivllm.errors import ModelLoadError
from minivllm.weights.files import resolve_model
for name, revision in [("org/name", None), ("org/name", "v1"), ("org/other", None)]:
    try:
        print(resolve_model(name, revision=revision).path)
    except ModelLoadError as error:
        print(error)
"""


def test_offline_from_the_cache(hf_home: Path, run_python: Callable[..., str]) -> None:
    printed = run_python(RESOLVE, HF_HOME=str(hf_home), HF_HUB_OFFLINE="1").splitlines()
    cached, no_revision, no_model = printed
    assert cached == str(hf_home / "hub" / "models--org--name" / "snapshots" / COMMIT)
    missing = f"isn't complete in the cache, {hf_home}/hub, and HF_HUB_OFFLINE is set"
    assert no_revision.startswith(f"org/name (revision v1) {missing}")
    assert no_model.startswith(f"org/other {missing}")


def test_offline_without_weights(hf_home: Path, run_python: Callable[..., str]) -> None:
    snapshot = hf_home / "hub" / "models--org--name" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    first = run_python(RESOLVE, HF_HOME=str(hf_home), HF_HUB_OFFLINE="1").splitlines()[0]
    assert first.startswith(f"org/name isn't complete in the cache, {hf_home}/hub, and HF_HUB_OFFLINE is set")
    (snapshot / "pytorch_model.bin").write_text("")  # fetched by other means: that's the weights there are
    first = run_python(RESOLVE, HF_HOME=str(hf_home), HF_HUB_OFFLINE="1").splitlines()[0]
    assert "must be .safetensors files, found only pytorch_model.bin" in first


def test_offline_with_a_shard_missing(hf_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hf_home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = hub.download_config("org/name", None)
    save_tiny_llama(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    min(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ModelLoadError, match="1 of the 5 files that it names are missing: model-00001-of"):
        resolve_model("org/name")
