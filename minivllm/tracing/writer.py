"""``--trace FILE``: each step as Chrome trace events, in a file that Perfetto opens as it grows.

It is a JSON array, one event a line, without its closing bracket: viewers don't ask for one, and a file
whose engine was killed is as good as any other. Every step is on disk, or with the operating system, when
the next one begins. What a file of that name held is kept as ``FILE.old``: where an engine died and another
took its place, that is the trace of its death.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, BinaryIO

from minivllm import __version__
from minivllm.config import EngineConfig
from minivllm.engine.steps import StepRecord
from minivllm.errors import StartupError
from minivllm.tracing.event import ENGINE_TID, NEXT_TID, encode, microseconds
from minivllm.tracing.spans import RequestSpans

logger = logging.getLogger(__name__)

FORMAT = 1
HEADER_NAME = "minivllm trace"
BEGINNING = f'[\n{{"name":"{HEADER_NAME}",'
_DEVICE_TID = 3


class TraceWriter:
    """A sink for step records. It never raises: when the disk is full, tracing ends and the engine goes on.

    Raises:
        StartupError: the file can't be written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._origin = 0.0
        self._shows_device = False
        self._numbers: dict[str, str] = {}
        self._num_requests = 0
        self._leaving: list[list[tuple[str, str]]] = [[], []]
        """Requests that ended in the last two steps: a step that runs ahead may still name them."""
        self._spans = RequestSpans()
        self._track_ends = {ENGINE_TID: 0, NEXT_TID: 0}
        try:
            if os.path.isfile(path) and os.path.getsize(path) > 0:
                os.replace(path, f"{path}.old")
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise StartupError(f"can't write --trace {path}: {error.strerror}") from None

    def begin(self, config: EngineConfig, about: dict[str, Any], *, origin: float, runs_ahead: bool) -> None:
        """Write what comes before the first step.

        Args:
            config: of the engine: the settings that aren't their defaults are written.
            about: what else whoever reads the trace should know, such as the ``model``.
            origin: the engine's clock, now: where the trace's time begins.
            runs_ahead: whether the device has a time of its own.

        Raises:
            StartupError: the file can't be written.
        """
        self._origin, self._shows_device = origin, runs_ahead
        flags = {
            field.name: getattr(config, field.name)
            for field in fields(config)
            if getattr(config, field.name) != field.default
        }
        header = {
            "format": FORMAT,
            "version": __version__,
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **about,
            "flags": flags,
        }
        lines = [
            _dump({"name": HEADER_NAME, "ph": "M", "pid": 1, "args": header}),
            _metadata("process_name", ENGINE_TID, f"minivllm {__version__} {about.get('model', '')}".strip()),
            _metadata("thread_name", ENGINE_TID, "engine"),
        ]
        if runs_ahead:
            lines += [
                _metadata("thread_name", NEXT_TID, "engine, next step"),
                _metadata("thread_name", _DEVICE_TID, "device"),
            ]
        try:
            self._write("[\n" + ",\n".join(lines) + ",\n")
        except OSError as error:
            raise StartupError(f"can't write --trace {self.path}: {error.strerror}") from None

    def __call__(self, record: StepRecord) -> None:
        """Write one step."""
        if self._file is None:
            return
        for arrival in record.arrived:
            self._num_requests += 1
            self._numbers[arrival.request_id] = str(self._num_requests)
        lines = [*self._step(record), *self._spans.follow(record, self._numbers, self._at)]
        lines += self._counts(record)
        try:
            self._write(",\n".join(lines) + ",\n")
        except OSError as error:
            logger.warning(
                "tracing ends with step %d: can't write %s: %s", record.number, self.path, error.strerror
            )
            self.close()
        for request_id, number in self._leaving.pop(0):
            if self._numbers.get(request_id) == number:  # not one that came since under the same id
                del self._numbers[request_id]
        self._leaving.append([(item.request_id, self._numbers[item.request_id]) for item in record.ended])

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _write(self, text: str) -> None:
        data = memoryview(text.encode())
        while self._file is not None and data:
            data = data[self._file.write(data) :]

    def _at(self, moment: float) -> int:
        return microseconds(moment, self._origin)

    def _step(self, record: StepRecord) -> list[str]:
        """The step, then what it encloses: on one track, unless the step before isn't over yet."""
        start, end = self._at(record.schedule_time), self._at(record.end_time)
        tid = ENGINE_TID if start >= self._track_ends[ENGINE_TID] else NEXT_TID
        self._track_ends[tid] = end
        lines = [encode(record, self._numbers, self._origin, tid)]
        if record.num_seqs == 0:
            return lines
        phases = [
            ("schedule", tid, record.schedule_time, record.execute_time),
            ("execute", tid, record.execute_time, record.launched_time),
            ("wait", tid, record.wait_time, record.tokens_time),
            ("update", tid, record.tokens_time, record.end_time),
        ]
        if self._shows_device:
            phases.append(("computes", _DEVICE_TID, record.device_start, record.tokens_time))
        for name, track, begin, over in phases:
            at = self._at(begin)
            lines.append(
                f'{{"name":"{name}","ph":"X","pid":1,"tid":{track},"ts":{at},"dur":{self._at(over) - at}}}'
            )
        return lines

    def _counts(self, record: StepRecord) -> list[str]:
        counts = (record.num_running, record.num_waiting, record.num_used_blocks)
        lines = [_counter(self._at(record.execute_time), *counts)]
        if self._spans.is_idle:
            lines.append(_counter(self._at(record.end_time), 0, 0, 0))
        return lines


def _counter(time: int, running: int, waiting: int, blocks: int) -> str:
    args = f'"running requests":{running},"waiting requests":{waiting},"KV blocks in use":{blocks}'
    return f'{{"name":"number of","ph":"C","pid":1,"ts":{time},"args":{{{args}}}}}'


def _dump(event: dict[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"))


def _metadata(kind: str, tid: int, name: str) -> str:
    return _dump({"name": kind, "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}})
