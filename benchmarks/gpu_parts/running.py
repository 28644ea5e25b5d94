"""Each part in a process of its own, on one clock.

A process, because memory comes back when it ends, a kernel's fault breaks CUDA for all that comes after
it in a process, and what hangs can be killed. A part's rows go to a file as they come: one that is cut,
fails or dies leaves what it has.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.setting import Part, Setting

GRACE = 8.0
"""Seconds between the moment when a part should stop and the one when it is killed."""
OUT_OF_TIME = "out of time"


def run_parts(
    parts: Mapping[str, tuple[Part, float]],
    setting: Setting,
    *,
    leave_out: Mapping[str, str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """All parts in their order: of each, its name, its rows by section, and why there aren't more.

    Args:
        parts: name → part, and its share of the time, in any unit. Whatever a part leaves over goes to
            those after it.
        setting: its deadline is everybody's.
        leave_out: name → reason.
    """
    shares = {name: share for name, (_, share) in parts.items() if name not in leave_out}
    for name, (part, _) in parts.items():
        if name in leave_out:
            yield name, {"skipped": leave_out[name]}
            continue
        seconds = setting.seconds_left * shares[name] / sum(shares.values())
        del shares[name]
        if seconds < GRACE / 4:
            yield name, {"skipped": OUT_OF_TIME}
            continue
        begin = time.monotonic()
        found = run_part(part, replace(setting, deadline=begin + seconds))
        yield name, found | {"seconds": round(time.monotonic() - begin, 1)}


def run_part(part: Part, setting: Setting) -> dict[str, Any]:
    """One part until its deadline. ``setting.deadline`` is when it is killed; it is told an earlier one."""
    grace = min(GRACE, setting.seconds_left / 4)
    told = replace(setting, deadline=setting.deadline - grace)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        process = multiprocessing.get_context("spawn").Process(target=_collect, args=(part, told, path))
        process.start()
        process.join(setting.seconds_left)
        is_late = process.is_alive()
        if is_late:
            process.kill()
            process.join()
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if is_late:
        found["cut"] = f"{OUT_OF_TIME}, killed"
    elif process.exitcode and "error" not in found:
        found["error"] = f"the process ended with code {process.exitcode}"
    return found


def _collect(part: Part, setting: Setting, path: Path) -> None:
    """In the child process."""
    found: dict[str, Any] = {}
    try:
        for section, row in part(setting):
            found.setdefault(section, []).append(row)
            _write(found, path)
            if setting.seconds_left == 0.0:
                found["cut"] = OUT_OF_TIME
                break
    except Exception:
        found["error"] = traceback.format_exc()
        traceback.print_exc()
    _write(found, path)


def _write(found: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, path)
