"""From a trace file back to the records of its steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from minivllm.engine.steps import StepRecord
from minivllm.errors import TraceError
from minivllm.tracing.event import PREFIX, StepDecoder
from minivllm.tracing.writer import BEGINNING, FORMAT

_NOT_SO = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a line as something that it isn't may raise."""


class TraceReader:
    """A file that ``--trace`` wrote; its engine may still be running.

    Iterating gives the records of its steps, with times in seconds since the trace began, and reads the
    file as it goes.

    Raises:
        TraceError: the file can't be read, isn't a trace, is damaged or cut short. Iterating gives all
            that is whole before it raises.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        """The engine's: ``version``, ``model``, ``started``, ``kv_blocks``, ``flags`` and so on."""
        self.num_steps = 0
        """That have been read."""
        self._lines = self._read()
        next(self._lines)  # the bracket
        line = next(self._lines)
        try:
            self.header = {**json.loads(line)["args"]}
        except _NOT_SO:
            raise TraceError(f"{path} is damaged: line 2 isn't a trace's first event") from None
        if self.header.get("format") != FORMAT:
            raise TraceError(
                f"{path} has format {self.header.get('format')}, and this minivllm reads {FORMAT} alone"
            )

    def __iter__(self) -> Iterator[StepRecord]:
        decode = StepDecoder()
        prefix = PREFIX.encode()
        for number, line in enumerate(self._lines, start=3):
            if not line.startswith(prefix):
                continue
            try:
                record = decode(line)
            except _NOT_SO:
                raise TraceError(
                    f"{self.path} is damaged: line {number}, after step {self.num_steps}, isn't a step"
                ) from None
            self.num_steps = record.number
            yield record

    def _read(self) -> Iterator[bytes]:
        """The lines that are whole, without what separates them."""
        try:
            with open(self.path, "rb") as file:
                beginning = file.read(len(BEGINNING))
                if not beginning:
                    raise TraceError(f"{self.path} is empty")
                if not BEGINNING.encode().startswith(beginning):
                    raise TraceError(f"{self.path} is not a minivllm trace")
                file.seek(0)
                for line in file:
                    if line.endswith(b"\n"):
                        yield line.rstrip(b",\r\n")
                    elif line != b"]":
                        raise TraceError(f"{self.path} is cut short {self._where()}")
        except OSError as error:
            raise TraceError(f"can't read {self.path}: {error.strerror}") from None
        if self.header == {}:
            raise TraceError(f"{self.path} is cut short {self._where()}")

    def _where(self) -> str:
        return f"after step {self.num_steps}" if self.num_steps else "before its first step"
