"""Fuzz: files, templates, bodies and messages with random changes, in child processes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minivllm.child import child_environment
from tests.endurance.findings import Findings

FORMATS = ("gguf", "safetensors", "config", "chat_template", "json", "messages")
MOST_GROWTH = 256
"""MiB that a format's cases may add to the most memory that was in use."""
_MAX_SECONDS = 1800


def fuzz(formats: tuple[str, ...], num_cases: int, seed: int, findings: Findings) -> None:
    """Run ``num_cases`` cases of each format in one child process."""
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.endurance.fuzz_child",
                str(num_cases),
                str(seed),
                progress,
                *formats,
            ],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=_MAX_SECONDS,
        )
        last = progress.read_text() if progress.exists() else "none"
    lines = child.stdout.splitlines()
    for result in map(json.loads, lines):
        _judge(result, num_cases, findings)
    findings.promise(
        f"{', '.join(formats)}: nothing ends the process",
        child.returncode == 0 and len(lines) == len(formats),
        f"code {child.returncode}" + (f" in case {last}: {child.stderr[-1000:]}" if child.returncode else ""),
    )


def _judge(result: dict[str, Any], num_cases: int, findings: Findings) -> None:
    name = result.pop("format")
    findings.figures[name] = result
    faults, num_refused = result["faults"], result["refused"]
    findings.promise(f"{name}: whatever is refused gets one clear error", not faults, faults or num_refused)
    num_run = result["taken"] + num_refused
    findings.promise(
        f"{name}: cases of both kinds", min(result["taken"], num_refused) > num_cases // 50, f"{num_run} run"
    )
    growth = result["memory grew by, MiB"]
    findings.promise(f"{name}: memory grows by less than {MOST_GROWTH} MiB", growth < MOST_GROWTH, growth)


def run(*, seed: int, quick: bool) -> Findings:
    """6,000 cases of each format, each format in a process of its own; quick: 300 in one process."""
    findings = Findings()
    if quick:
        fuzz(FORMATS, 300, seed, findings)
    else:
        for name in FORMATS:
            fuzz((name,), 6_000, seed, findings)
    return findings
