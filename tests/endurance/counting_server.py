"""``minivllm serve``, which on SIGUSR1 writes which asyncio tasks it has, and how many
blocks of Python's memory are in use, to a file.

``python -m tests.endurance.counting_server -m minivllm.serve …``: nothing else about the server is different.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from minivllm import cli
from tests.endurance.processes import COUNTS_VARIABLE


def _count(*_: Any) -> None:
    """Between two steps of the event loop, in its thread."""
    names = [getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks()]
    path = Path(os.environ[COUNTS_VARIABLE])
    draft = path.with_suffix(".draft")
    num_pooled = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
    gc.collect()
    counts = {
        "tasks": dict(Counter(names)),
        "pooled threads": num_pooled,
        "memory blocks": sys.getallocatedblocks(),
    }
    draft.write_text(json.dumps(counts))
    draft.rename(path)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _count)
    sys.exit(cli.run("serve", sys.argv[3:]))
