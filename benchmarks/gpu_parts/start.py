"""Seconds from the start of a process to its first token, with random weights instead of a file's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_parts.setting import Row, Setting

ROOT = Path(__file__).resolve().parents[2]


def start(setting: Setting) -> Iterator[tuple[str, Row]]:
    """With the kernels that Triton has compiled before; on CUDA, with none, too."""
    yield "starts", {"triton_cache": "as it is", **first_token(setting, {})}
    if setting.device == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            row = first_token(setting, {"TRITON_CACHE_DIR": folder})
        yield "starts", {"triton_cache": "empty", **row}


def first_token(setting: Setting, environment: dict[str, str]) -> Row:
    """Seconds since the process was started, by stage."""
    settings = {"device": setting.device, "max_model_len": setting.sizes.max_model_len} | setting.engine
    command = [sys.executable, "-m", "benchmarks.gpu_parts.first_token", setting.folder, json.dumps(settings)]
    begin = time.monotonic()
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        cwd=ROOT,
        timeout=max(setting.seconds_left, 1.0),
    )
    moments = json.loads(result.stdout.splitlines()[-1])
    return {"seconds": {name: moment - begin for name, moment in moments.items()}}
