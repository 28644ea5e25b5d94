"""The memory that a container has: what Linux's control groups leave to the processes in them.

Inside a container, too, the system's own figures are the whole machine's; whoever takes more than the
group's limit is killed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class _Names(NamedTuple):
    limit: str
    used: str
    inactive_file: str
    """In memory.stat: page cache, which counts as used and is given up for others."""


_V2 = _Names("memory.max", "memory.current", "inactive_file")
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[int, int] | None:
    """(free, total) bytes of this process's group, or of the one around it that leaves less.

    None where no group has a limit, or there are no groups.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, _V2
        elif "memory" in controllers.split(","):
            base, names = root / "memory", _V1
        else:
            continue
        group = base / path.lstrip("/")
        found += [_read(folder, names) for folder in (group, *group.parents)]
    return min((memory for memory in found if memory is not None), default=None)


def _read(folder: Path, names: _Names) -> tuple[int, int] | None:
    try:
        limit = (folder / names.limit).read_text().strip()
        used = int((folder / names.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # above the groups, or a path that only means something outside of the container
        return None
    if limit == "max":
        return None
    return int(limit) - used + int(stat.get(names.inactive_file, 0)), int(limit)
