"""How the C++ kernels are built and loaded: without a compiler, and beside torch's threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from minivllm_kernels import available_backends

ROOT = Path(__file__).parents[2]


def run_python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A child process that imports what this one does."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("compiler", ["false", "there-is-no-such-compiler"])
def test_without_a_compiler_the_build_goes_on_without_the_kernels(tmp_path: Path, compiler: str) -> None:
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    result = run_python("setup.py", "build_ext", *folders, CC=compiler, CXX=compiler)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert 'building extension "minivllm_kernels._cpu" failed' in output
    assert not list(tmp_path.rglob("_cpu*"))


def test_without_the_kernels_one_warning_says_what_runs_and_what_it_costs() -> None:
    code = (
        "import sys, logging\n"
        "sys.modules['minivllm_kernels._cpu'] = None\n"  # importing it is an ImportError
        "import torch\n"
        "from minivllm_kernels import available_backends\n"
        "from minivllm.engine.startup import _kernels\n"
        "logging.basicConfig(format='%(levelname)s %(message)s', level='INFO')\n"
        "print(available_backends(), _kernels(torch.device('cpu'), torch.float32).name)\n"
    )
    result = run_python("-c", code)
    assert result.stdout == "['reference'] reference\n", result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("WARNING kernels: plain torch")
    assert "several times slower" in line
    assert "C++ compiler" in line


COUNT_THREADS = """
import json, os, sys
import torch
from minivllm_kernels import PackedWeight, get_backend, quantize_int8

def num_threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)  # what comes first starts no threads
kernels = get_backend("portable")
rows = torch.ones(64, 64)
weight = PackedWeight(*rows.shape, bits=8)
weight.write(0, quantize_int8(rows))
torch.set_num_threads(int(sys.argv[1]))
counts = [num_threads()]
kernels.linear(rows, weight)
counts.append(num_threads())
torch.ones(2**20).exp()
counts.append(num_threads())
with open("/proc/self/maps") as maps:
    names = {os.path.basename(line.split()[-1]) for line in maps}
print(json.dumps({"counts": counts, "runtimes": [name for name in names if "omp" in name]}))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(available_backends()[0] == "reference", reason="the C++ kernels aren't built")
@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_kernels_run_on_torchs_threads(num_threads: int) -> None:
    """As many as torch is told to use, in the one OpenMP runtime that is loaded."""
    result = run_python("-c", COUNT_THREADS, str(num_threads))
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    before, with_kernels, with_torch = found["counts"]
    assert with_kernels == before + num_threads - 1
    assert with_torch == with_kernels
    (runtime,) = found["runtimes"]
    assert runtime.startswith("libgomp")
