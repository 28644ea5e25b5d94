"""benchmarks/gpu.py to its end on a CPU, and what happens to parts that fail, die, hang or are left out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_parts import summary
from benchmarks.gpu_parts.decode import decode
from benchmarks.gpu_parts.running import run_parts
from benchmarks.gpu_parts.setting import TINY, Setting
from benchmarks.gpu_parts.step_profile import covered, summarise
from benchmarks.gpu_parts.table import summary as times_summary
from benchmarks.gpu_parts.targets import lines as target_lines
from benchmarks.gpu_parts.targets import targets
from tests.benchmarks import fake_parts

ROOT = Path(__file__).parents[2]
PARTS = ["ceilings", "kernels", "decode", "table", "transformers", "start"]


def run_command(output: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--model-shape", "tiny"]
    command += ["--cpu-threads", "1", "--output", str(output), *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 sequence, share of the floor" in result.stdout
    report: dict[str, Any] = json.loads(output.read_text())
    assert list(report["parts"]) == PARTS
    return report


def test_every_part_runs_to_its_end(tmp_path: Path) -> None:
    report = run_command(tmp_path / "gpu.json", "--budget", "3000")
    assert report["software"]["torch"] == torch.__version__
    assert {"machine", "commit", "card", "targets", "sizes"} <= report.keys()
    found = report["parts"]
    for name in PARTS:
        assert not {"error", "cut"} & found[name].keys(), found[name]
    assert found["ceilings"]["copy"][0]["gb_per_s"] > 0
    cases = [(row["batch"], row["context"]) for row in found["kernels"]["decode attention"]]
    assert sorted(cases) == sorted((b, c) for b in TINY.decode_batches for c in TINY.decode_contexts)
    assert len(found["kernels"]["small kernels"]) == 3 * len(TINY.small_kernel_tokens)
    steps = found["decode"]["steps"]
    assert [(row["users"], row["context"]) for row in steps] == [*TINY.decodes]
    assert all(row["tokens_per_s"] > 0 and row["preemptions"] == 0 for row in steps)
    runs = found["table"]["runs"]
    assert len(runs) == 3 * len(TINY.table_users)
    for row in runs:
        assert row["is_complete"]
        assert row["output_tokens"] == row["users"] * TINY.output_tokens
        assert row["most_at_once"] == (1 if "sequential" in row["policy"] else row["users"])
        assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"]
    assert [row["users"] for row in found["transformers"]["runs"]] == [1, 6]
    assert found["transformers"]["skipped"][0]["case"] == "continuous batching"
    seconds = list(found["start"]["starts"][0]["seconds"].values())
    assert seconds == sorted(seconds)
    assert not any(row["is_reached"] for row in report["targets"]), "a CPU reaches none of a GPU's targets"


def test_parts_that_are_left_out_say_why(tmp_path: Path) -> None:
    found = run_command(tmp_path / "gpu.json", "--only", "ceilings,table", "--skip", "table")["parts"]
    assert found["table"] == {"skipped": "--skip"}
    assert found["start"] == {"skipped": "not in --only"}
    assert found["ceilings"].keys() == {"copy", "product", "seconds"}


def test_without_time_every_part_says_so(tmp_path: Path) -> None:
    found = run_command(tmp_path / "gpu.json", "--budget", "0")["parts"]
    assert found == {name: {"skipped": "out of time"} for name in PARTS}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cpu"], "--model-shape llama-3.1-8b is for a GPU"),
        (["--device", "cpu", "--model-shape", "tiny", "--only", "sailing"], "got sailing"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: list[str], message: str) -> None:
    command = [sys.executable, "benchmarks/gpu.py", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_part_that_fails_takes_no_other_down(tmp_path: Path) -> None:
    setting = Setting(
        device="cpu", sizes=TINY, folder=str(tmp_path), engine={}, deadline=time.monotonic() + 120
    )
    # The two that use up all they are given get little of it.
    parts = {
        "failing": (fake_parts.failing, 50.0),
        "dying": (fake_parts.dying, 50.0),
        "hanging": (fake_parts.hanging, 12.0),
        "endless": (fake_parts.endless, 12.0),
        "fine": (fake_parts.fine, 100.0),
    }
    found = dict(run_parts(parts, setting, leave_out={}))
    assert "the kernel refused" in found["failing"]["error"]
    assert found["dying"]["error"] == "the process ended with code 9"
    assert found["hanging"]["cut"] == "out of time, killed"
    for name in ("failing", "dying", "hanging"):
        assert found[name]["numbers"] == [{"before": True}], "rows found before are kept"
    assert found["endless"]["cut"] == "out of time"
    assert len(found["endless"]["numbers"]) > 1
    assert found["fine"].keys() == {"numbers", "seconds"}
    assert list(found) == list(parts)
    assert "failing: failed: RuntimeError: the kernel refused" in list(summary.lines(found))


def test_a_sequence_too_many_is_left_out_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.model))
    setting = Setting(
        device="cpu",
        sizes=TINY,
        folder=str(tmp_path),
        engine={"max_num_seqs": 1, "cpu_threads": 1},
        deadline=time.monotonic() + 120,
    )
    rows = list(decode(setting))
    assert [row["users"] for section, row in rows if section == "steps"] == [1]
    assert [row["case"] for section, row in rows if section == "skipped"] == ["4 x 20", "2 x 64"]


def test_covered_against_a_count_of_microseconds() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 400, (30,), generator=generator).tolist()
    lengths = torch.randint(1, 9, (30,), generator=generator).tolist()
    intervals = [(float(s), float(s + n)) for s, n in zip(starts, lengths, strict=True)]
    busy = {t for s, n in zip(starts, lengths, strict=True) for t in range(s, s + n)}
    assert covered(intervals) == len(busy)
    moments = sorted(busy)
    closed = sum(b - a - 1 for a, b in pairwise(moments) if b - a - 1 <= 5)
    assert covered(intervals, 5.0) == len(busy) + closed
    assert covered([]) == 0.0


def test_a_profile_tells_work_from_waiting() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]

    def event(name: str, device: object, start: float, end: float, mark: bool = False) -> SimpleNamespace:
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=device, time_range=time_range, is_user_annotation=mark)

    events = [
        event("kernel", cuda, 0, 100),
        event("kernel", cuda, 104, 200),  # a launch's gap
        event("Memcpy DtoH", cuda, 300, 400),
        event("step", cuda, 0, 1000, mark=True),
        event("cudaLaunchKernel", cpu, 0, 10),
        event("cudaStreamSynchronize", cpu, 50, 450),
        event("cudaMemcpyAsync", cpu, 40, 60),
    ]
    profile = summarise(events, 2, 1000e-6)
    assert profile.busy == pytest.approx(150e-6)
    assert profile.working == pytest.approx(148e-6)
    assert profile.host == pytest.approx(295e-6)


def test_percentiles_are_values_that_occurred() -> None:
    assert times_summary([]) is None
    assert times_summary([0.002]) == {"mean": 2.0, "p50": 2.0, "p99": 2.0}
    many = times_summary([n / 1000 for n in range(1000, 0, -1)])
    assert many == pytest.approx({"mean": 500.5, "p50": 500.0, "p99": 990.0})


def test_targets_take_the_worst_case_and_leave_open_what_was_not_measured() -> None:
    found = {
        "decode": {
            "steps": [
                {"users": 1, "context": 200, "share_of_floor": 0.93, "idle_share": 0.01},
                {"users": 1, "context": 2048, "share_of_floor": 0.5},
                {"users": 128, "context": 200, "share_of_floor": 0.5, "idle_share": 0.04},
            ]
        },
        "kernels": {
            "decode attention": [
                {"batch": 1, "context": 128, "share_of_copy": 0.01},
                {"batch": 16, "context": 2048, "share_of_copy": 0.79},
                {"batch": 64, "context": 8192, "share_of_copy": 0.95},
            ],
            "prefill attention": [{"speed_relative_to_torch": 0.7}, {"torch": "failed"}],
        },
        "table": {
            "runs": [
                {"policy": "paged, continuous", "users": 50, "tokens_per_s": 6400.0},
                {"policy": "contiguous, sequential (ollama)", "users": 50, "tokens_per_s": 100.0},
            ]
        },
    }
    rows = targets(found)
    assert [row["is_reached"] for row in rows] == [True, True, None, False, True, True, False]
    assert [row["measured"] for row in rows] == [0.93, 6400.0, None, 0.79, 0.7, 64.0, 0.04]
    text = target_lines(rows)
    assert text[1].endswith("reached")
    assert text[3].endswith("not measured")
    assert text[4].endswith("not reached")
    assert [row["is_reached"] for row in targets({})] == [None] * 7
