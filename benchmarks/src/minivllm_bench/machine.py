"""What a benchmark ran on, and whether anything else was running there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, object]:
    """The machine and the interpreter, for the results file."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "vector instructions": [
            name
            for name in ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
            if name in (_field("/proc/cpuinfo", "flags") or "").split()
        ],
        "memory": _field("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
        # How threads wait for each other: what matters most where a client shares a server's cores.
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))
        },
        "load average": [round(load, 2) for load in os.getloadavg()],
    }


def revision(folder: Path) -> str:
    """The commit of a checkout, with ``-dirty`` where files were changed; "unknown" outside of one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def without_folders(command: list[str]) -> list[str]:
    """A command as results show it: where programs and models lie says nothing to others."""
    return [Path(part).name if part.startswith("/") else part for part in command]


def busy_processes(seconds: float = 2.0) -> dict[str, float]:
    """Cores' worth of time that each other process takes while this one sleeps; those above 0.03."""
    before, start = _cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    after, elapsed = _cpu_seconds(), time.monotonic() - start
    busy = {}
    for pid, (name, used) in after.items():
        share = (used - before.get(pid, (name, 0.0))[1]) / elapsed
        if share > 0.03 and pid != os.getpid():
            busy[f"{name} ({pid})"] = round(share, 2)
    return dict(sorted(busy.items(), key=lambda item: -item[1]))


def warn_if_busy() -> dict[str, float]:
    """:func:`busy_processes`, with a warning on standard error if there are any."""
    busy = busy_processes()
    if busy:
        taken = ", ".join(f"{name} {share:.2f} cores" for name, share in busy.items())
        print(
            f"warning: the machine is not idle, the figures will be wrong: {taken}",
            file=sys.stderr,
            flush=True,
        )
    return busy


def _cpu_seconds() -> dict[int, tuple[str, float]]:
    """Name and CPU seconds so far of each process. Empty where there is no /proc."""
    processes = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it has just ended
            continue
        head, _, tail = text.rpartition(")")  # the name before it may have spaces and parentheses
        pid, name = head.split(" (", 1)
        user, system = tail.split()[11:13]
        processes[int(pid)] = name, (int(user) + int(system)) / _TICKS_PER_SECOND
    return processes


def _field(path: str, name: str) -> str | None:
    """The first ``name : value`` of a file under /proc. None where there isn't one."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)
