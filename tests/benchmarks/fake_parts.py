"""Parts as the benchmark's runner may meet them. Light to import, as a child does with a clock running."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from benchmarks.gpu_parts.setting import Row, Setting


def fine(setting: Setting) -> Iterator[tuple[str, Row]]:
    yield "numbers", {"one": 1}


def failing(setting: Setting) -> Iterator[tuple[str, Row]]:
    yield "numbers", {"before": True}
    raise RuntimeError("the kernel refused")


def dying(setting: Setting) -> Iterator[tuple[str, Row]]:
    yield "numbers", {"before": True}
    os._exit(9)


def hanging(setting: Setting) -> Iterator[tuple[str, Row]]:
    yield "numbers", {"before": True}
    while True:
        time.sleep(60)


def endless(setting: Setting) -> Iterator[tuple[str, Row]]:
    while True:
        yield "numbers", {"left": setting.seconds_left}
        time.sleep(0.1)  # its work
