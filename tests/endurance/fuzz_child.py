"""A process that feeds mutated input to targets, with a limit on its memory and on the time for each case.

``python -m tests.endurance.fuzz_child COUNT SEED PROGRESS FORMAT…``: the number of the case is in the file
PROGRESS before it begins, so that one that ends the process is known. Prints a line of JSON for each format.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.endurance.fuzz_targets import TARGETS

MEMORY = 2**30
"""Bytes of address space that all cases may take beyond what there was before the first."""
MAX_SECONDS = 10.0
"""Of one case; a machine may be busy."""
_WARM_UP = 50
_MOST_FAULTS = 20


class _TooLongError(BaseException):
    """Not an Exception: nothing on the way may take it for one of its own."""


def main(num_cases: int, seed: str, progress: Path, formats: list[str]) -> None:
    """Run them one after the other."""
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _interrupt)
    for name in formats:
        with TARGETS[name]() as target, progress.open("w") as file:
            results = _Results(name)
            for number in range(-_WARM_UP, num_cases):
                if number == 0:
                    _limit_memory()
                    results = _Results(name)
                os.pwrite(file.fileno(), f"{name} {number:8}".encode(), 0)
                results.run(target, random.Random(f"{seed}/{name}/{number}"), number)
                if len(results.faults) >= _MOST_FAULTS:
                    break
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(json.dumps(results.as_json()), flush=True)


class _Results:
    def __init__(self, name: str) -> None:
        self.name = name
        self.num_taken = self.num_refused = 0
        self.slowest = 0.0
        self.faults: list[str] = []
        self._peak = _peak_bytes()

    def run(self, target: Any, rng: random.Random, number: int) -> None:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
        try:
            is_taken = target(rng)
            self.num_taken += is_taken
            self.num_refused += not is_taken
        except _TooLongError:
            self.faults.append(f"case {number}: more than {MAX_SECONDS:g} s")
        except Exception as error:
            self.faults.append(f"case {number}: {type(error).__name__}: {str(error)[:500]}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest = max(self.slowest, time.monotonic() - start)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": self.name,
            "taken": self.num_taken,
            "refused": self.num_refused,
            "faults": self.faults,
            "slowest case, s": round(self.slowest, 3),
            "memory grew by, MiB": round((_peak_bytes() - self._peak) / 2**20, 1),
        }


def _interrupt(*_: Any) -> None:
    raise _TooLongError


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
