"""What minivllm does on an NVIDIA GPU, in one command of at most nine minutes.

    python benchmarks/gpu.py --output gpu.json [--only PART,...] [--skip PART,...] [ENGINE FLAGS]

Runs from a checkout, installed or not, and needs torch, triton, transformers, numpy, safetensors and
tokenizers: no network, no model files. Weights are random, in Llama-3.1-8B's shape. The parts, in order:

    ceilings      a large copy, a large matrix product: what everything else is measured against
    kernels       attention and the small kernels, beside the copy and torch's own attention
    decode        steady decode steps of 1 to 256 sequences, beside the time that a copy of the weights
                  and the KV cache takes, and the share of a step in which the GPU waits
    table         50 and 128 users, 100 tokens in and 200 out: paged and contiguous, continuous and sequential
    transformers  generate and continuous batching of transformers on the same shape
    start         a process's start to its first token

Each part has a share of ``--budget``, and what it leaves over goes to the next; a case that there is no
time or memory for is left out, with the reason in the results. ``--device cpu --model-shape tiny`` tries
the command itself where there is no GPU: its figures mean nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# In this folder's place, whose kernels.py transformers would take for Hugging Face's package of that name.
sys.path[:1] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks" / "src")]

from minivllm.openmp import spin_briefly  # noqa: E402

spin_briefly()

import torch  # noqa: E402

from benchmarks.gpu_parts import summary  # noqa: E402
from benchmarks.gpu_parts.ceilings import ceilings  # noqa: E402
from benchmarks.gpu_parts.decode import decode  # noqa: E402
from benchmarks.gpu_parts.kernels import kernels  # noqa: E402
from benchmarks.gpu_parts.peer import transformers_peer  # noqa: E402
from benchmarks.gpu_parts.running import run_parts  # noqa: E402
from benchmarks.gpu_parts.setting import FULL, SHAPES, Part, Setting  # noqa: E402
from benchmarks.gpu_parts.start import start  # noqa: E402
from benchmarks.gpu_parts.table import table  # noqa: E402
from benchmarks.gpu_parts.targets import lines as target_lines  # noqa: E402
from benchmarks.gpu_parts.targets import targets  # noqa: E402
from minivllm.config import EngineConfig, option  # noqa: E402
from minivllm.flags import Parser  # noqa: E402
from minivllm_bench import machine  # noqa: E402

PARTS: dict[str, tuple[Part, float]] = {
    "ceilings": (ceilings, 25),
    "kernels": (kernels, 115),
    "decode": (decode, 120),
    "table": (table, 130),
    "transformers": (transformers_peer, 90),
    "start": (start, 60),
}
"""And each one's share of the time: of 540 seconds, seconds."""


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """What is measured, and for how long."""

    output: str | None = option(None, "write everything to this JSON file, too")
    budget: float = option(540.0, "seconds for everything")
    only: str | None = option(None, f"parts to run, with commas between them (default: {','.join(PARTS)})")
    skip: str | None = option(None, "parts to leave out, with commas between them")
    model_shape: str = option(
        "llama-3.1-8b", "of the random weights, and the sizes that go with it", choices=tuple(SHAPES)
    )


def main(argv: list[str]) -> int:
    begin = time.monotonic()
    parser = Parser("benchmarks/gpu.py", "Kernels, engine and start-up on an NVIDIA GPU.")
    parser.add_config(GpuConfig, "benchmark")
    parser.add_config(EngineConfig, "engine")
    parsed = parser.parse(argv)
    config, engine = parser.make_config(GpuConfig, parsed), parser.make_config(EngineConfig, parsed)
    only, skip = _names(config.only), _names(config.skip)
    if unknown := {*only, *skip} - {*PARTS}:
        parser.error(f"--only and --skip take {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    device = engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable NVIDIA GPU; --device cpu --model-shape tiny runs")
    if device == "cpu" and config.model_shape != "tiny":
        parser.error(f"--model-shape {config.model_shape} is for a GPU; on a CPU give --model-shape tiny")
    leave_out = dict.fromkeys(skip, "--skip")
    leave_out |= {name: "not in --only" for name in PARTS if only and name not in only}

    sizes = SHAPES[config.model_shape]
    engine_names = {field.name for field in fields(EngineConfig)} - {"device", "model", "load_format"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(sizes.model))
        setting = Setting(
            device=device,
            sizes=sizes,
            folder=folder,
            engine={name: value for name, value in vars(parsed).items() if name in engine_names},
            deadline=begin + config.budget,
        )
        report: dict[str, Any] = {
            "benchmark": {**asdict(config), "device": device, "engine": setting.engine},
            "software": software(),
            "card": card() if device == "cuda" else None,
            "machine": machine.describe(),
            "commit": machine.revision(ROOT),
            "sizes": asdict(sizes),
        }
        results: dict[str, dict[str, Any]] = {}
        for name, found in run_parts(PARTS, setting, leave_out=leave_out):
            results[name] = found
            outcome = next((word for word in ("skipped", "error", "cut") if word in found), "done")
            _say(f"{name}: {outcome}, {time.monotonic() - begin:.0f} s since the start")
            # The targets are a GPU's. Written after each part, so that an interrupted run leaves what it has.
            reached = targets(results if device == "cuda" and sizes is FULL else {})
            report |= {"targets": reached, "parts": results, "seconds": round(time.monotonic() - begin, 1)}
            if config.output is not None:
                Path(config.output).write_text(json.dumps(report, indent=1) + "\n")
    print(*summary.lines(results), "", *target_lines(reached), sep="\n", flush=True)
    return int(any("error" in found for found in results.values()))


def software() -> dict[str, str | None]:
    """Versions of what matters to the figures."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda, "torch": torch.__version__}
    for name in ("triton", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def card() -> dict[str, str]:
    """The GPU as nvidia-smi describes it; empty where it doesn't answer."""
    names = ["name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    return dict(zip(names, values, strict=False))


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _say(text: str) -> None:
    """Progress goes to standard error, results to standard output."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
