"""A container's memory, read from made-up control groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minivllm.engine import memory
from minivllm.engine.cgroup import cgroup_memory

MIB = 2**20


def group(folder: Path, files: dict[str, object], inactive_file: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{inactive_file}\nactive_file 5\n")


def version_2(folder: Path, limit: object, used: int, cache: int) -> None:
    group(folder, {"memory.max": limit, "memory.current": used}, f"inactive_file {cache}")


def version_1(folder: Path, limit: object, used: int, cache: int) -> None:
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
    group(folder, files, f"inactive_file 3\ntotal_inactive_file {cache}")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own"


def test_a_group_of_its_own(tmp_path: Path, own: Path) -> None:
    """What a container with a namespace of its own sees: itself as the root."""
    own.write_text("0::/\n")
    version_2(tmp_path, 1000 * MIB, 300 * MIB, 100 * MIB)
    assert cgroup_memory(tmp_path, own) == (800 * MIB, 1000 * MIB)


def test_the_tightest_of_groups_within_groups(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/a/b/c\n")
    version_2(tmp_path / "a", 2000 * MIB, 1900 * MIB, 0)
    version_2(tmp_path / "a/b", 1000 * MIB, 300 * MIB, 0)
    version_2(tmp_path / "a/b/c", "max", 300 * MIB, 0)
    assert cgroup_memory(tmp_path, own) == (100 * MIB, 2000 * MIB)


def test_version_1(tmp_path: Path, own: Path) -> None:
    own.write_text("12:cpu,cpuacct:/x\n5:memory:/x\n1:name=systemd:/x\n0::/x\n")
    version_1(tmp_path / "memory", 9223372036854771712, 500 * MIB, 0)
    version_1(tmp_path / "memory/x", 400 * MIB, 100 * MIB, 50 * MIB)
    assert cgroup_memory(tmp_path, own) == (350 * MIB, 400 * MIB)


@pytest.mark.parametrize("groups", [None, "", "0::/\n", "0::/elsewhere:with/colons\n", "2:cpu:/\n"])
def test_no_limit(tmp_path: Path, own: Path, groups: str | None) -> None:
    if groups is not None:
        own.write_text(groups)
    version_2(tmp_path, "max", 1, 1)
    assert cgroup_memory(tmp_path, own) is None


def test_what_the_device_has_is_the_container_s(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "cgroup_memory", lambda: None)
    _, machine = memory.device_memory(cpu)
    monkeypatch.setattr(memory, "cgroup_memory", lambda: (3 * MIB, 5 * MIB))
    assert memory.device_memory(cpu) == (3 * MIB, 5 * MIB)
    monkeypatch.setattr(memory, "cgroup_memory", lambda: (2**60, 2**60))
    free, total = memory.device_memory(cpu)
    assert free < total == machine
