"""benchmarks/scheduler.py measures what it says it does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_part_of_every_step_is_timed(tmp_path: Path) -> None:
    output = tmp_path / "scheduler.json"
    command = [sys.executable, "benchmarks/scheduler.py", "--sequences", "1,5", "--context", "40"]
    command += ["--steps", "20", "--trace", "--profile", "--output", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "scheduler.py" in result.stdout, "the profile names the functions' files"
    assert result.stdout.count("bytes of trace a step") == 2
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["1", "5"]
    for figures in results.values():
        parts = [figures[name]["mean_ms"] for name in ("schedule", "build", "update", "trace")]
        assert min(parts) > 0
        assert abs(sum(parts) - figures["all"]["mean_ms"]) < 1e-9
