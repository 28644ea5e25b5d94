"""The Triton kernels as compiled for production, without a GPU: registers, shared memory, instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.compile_report import table

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton isn't installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""What one program may have, by compute capability: CUDA C++ Programming Guide, technical specifications."""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """In a process of its own: with TRITON_INTERPRET, a kernel can only be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "tests.kernels.compile_report"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    print(table(rows))
    return rows


def faulty(rows: list[dict[str, Any]], is_faulty: Any) -> str:
    found = [row for row in rows if is_faulty(row)]
    return table(found) if found else ""


def test_every_kernel_compiles(rows: list[dict[str, Any]]) -> None:
    assert rows
    assert not faulty(rows, lambda row: row["error"])


def test_next_to_nothing_spills(rows: list[dict[str, Any]]) -> None:
    """CUDA 13's ptxas gives up to eight of a thread's registers for a second program on a multiprocessor."""
    assert not faulty(rows, lambda row: row["spilled_bytes"] > 8 * 4)


def test_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    assert not faulty(rows, lambda row: row["shared_bytes"] > SHARED_KIB[row["case"]["capability"]] * 1024)


def test_attention_is_on_tensor_cores(rows: list[dict[str, Any]]) -> None:
    """With the newest instructions where tiles have the 64 rows that these need."""
    newest = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCMMA", 120: "HMMA"}

    def is_off(row: dict[str, Any]) -> bool:
        counts = row["instructions"] or {}
        if row["case"]["call"].startswith("prefill"):
            return not counts.get(newest[row["case"]["capability"]])
        return not any(counts.get(name) for name in ("HMMA", "HGMMA", "UTCMMA"))

    attention = [row for row in rows if row["kernel"] == "attention_kernel"]
    assert attention
    assert not faulty(attention, is_off)
