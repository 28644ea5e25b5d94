"""Where each request waits or runs, as spans that a trace viewer draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from minivllm.engine.steps import Arrival, Ending, StepRecord

_FIRST_ROW_TID = 10


@dataclass(slots=True)
class _Row:
    """A track for one running request at a time."""

    tid: int
    time: int = 0
    """Of its last event. An end may come to light when the next step has begun: nothing goes before it."""
    is_decoding: bool = False

    def event(self, ph: str, time: int, rest: str = "") -> str:
        self.time = max(self.time, time)
        return f'{{"ph":"{ph}","pid":1,"tid":{self.tid},"ts":{self.time}{rest}}}'


class RequestSpans:
    """Turns step records into spans: those that wait are asynchronous, those that run have rows.

    A row takes the next request when one has left it, so there are as many as requests ran at once. A span
    begins with an event of its own, which is written at once: the requests of a killed engine show, too.
    """

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        """Of the requests that run, by id."""
        self._free_rows: list[_Row] = []
        self._num_rows = 0
        self._waiting: dict[str, tuple[str, str]] = {}
        """Of those that wait: their number, and the name of the span."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits or runs."""
        return not self._rows and not self._waiting

    def follow(self, record: StepRecord, numbers: Mapping[str, str], at: Callable[[float], int]) -> list[str]:
        """The events of one more step.

        Args:
            numbers: of the requests in the record, by their ids.
            at: from a moment of the engine's clock to one of the trace's.
        """
        lines: list[str] = []
        now = at(record.schedule_time)
        for arrival in record.arrived:
            lines += self._arrive(arrival, numbers[arrival.request_id], at)
        for ending in record.ended:
            if ending.time <= record.schedule_time:
                lines += self._end(ending, at(ending.time))
        for eviction in record.evicted:
            if eviction.request_id in self._rows:  # else it has ended since
                lines += self._leave(eviction.request_id, now, "evicted")
                lines.append(self._wait(eviction.request_id, numbers[eviction.request_id], now, "evicted"))
        for admission in record.admitted:
            if admission.request_id in self._waiting:
                lines += self._run(admission.request_id, now, admission.num_cached_tokens)
        if record.error is None:
            sampled = [item.request_id for item in record.prefills if item.is_last]
            sampled += [item.request_id for item in record.admitted if item.request_id in record.decodes]
            for request_id in sampled:
                lines += self._decode(request_id, at(record.tokens_time))
        for ending in record.ended:
            if ending.time > record.schedule_time:
                lines += self._end(ending, at(ending.time))
        return lines

    def _arrive(self, arrival: Arrival, number: str, at: Callable[[float], int]) -> list[str]:
        lines = []
        came, queued = at(arrival.time), at(arrival.queued_time)
        if queued > came:
            # An id of its own: viewers put all spans of one id on a track, and name it by the first.
            rest = f'"cat":"grammar","id":"{number}","name":"grammar compiled","pid":1,"tid":1'
            args = f'"args":{{"request":{json.dumps(arrival.request_id)}}}'
            lines += [f'{{{rest},"ph":"b","ts":{came},{args}}}', f'{{{rest},"ph":"e","ts":{queued}}}']
        return [*lines, self._wait(arrival.request_id, number, queued, "queued")]

    def _wait(self, request_id: str, number: str, time: int, name: str) -> str:
        self._waiting[request_id] = number, name
        args = f'"args":{{"request":{json.dumps(request_id)}}}'
        return f'{{{_waiting(number, name)},"ph":"b","ts":{time},{args}}}'

    def _run(self, request_id: str, time: int, num_cached_tokens: int) -> list[str]:
        number, name = self._waiting.pop(request_id)
        lines = [f'{{{_waiting(number, name)},"ph":"e","ts":{time}}}']
        row = next((row for row in self._free_rows if row.time <= time), None)
        if row is None:
            row = _Row(_FIRST_ROW_TID + self._num_rows)
            args = f'"args":{{"name":"running {self._num_rows}"}}'
            lines.append(f'{{"name":"thread_name","ph":"M","pid":1,"tid":{row.tid},{args}}}')
            self._num_rows += 1
        else:
            self._free_rows.remove(row)
        self._rows[request_id], row.is_decoding = row, False
        args = f'"args":{{"number":{number},"cached_tokens":{num_cached_tokens}}}'
        lines.append(row.event("B", time, f',"name":{json.dumps(request_id)},{args}'))
        lines.append(row.event("B", time, ',"name":"prefill"'))
        return lines

    def _decode(self, request_id: str, time: int) -> list[str]:
        row = self._rows.get(request_id)
        if row is None or row.is_decoding:
            return []
        row.is_decoding = True
        return [row.event("E", time), row.event("B", time, ',"name":"decode"')]

    def _leave(self, request_id: str, time: int, why: str) -> list[str]:
        row = self._rows.pop(request_id)
        self._free_rows.append(row)
        self._free_rows.sort(key=lambda row: row.tid)
        return [row.event("E", time), row.event("E", time, f',"args":{{"left":"{why}"}}')]

    def _end(self, ending: Ending, time: int) -> list[str]:
        if ending.request_id in self._rows:
            return self._leave(ending.request_id, time, ending.reason.value)
        if ending.request_id not in self._waiting:
            return []
        number, name = self._waiting.pop(ending.request_id)
        return [
            f'{{{_waiting(number, name)},"ph":"e","ts":{time},"args":{{"left":"{ending.reason.value}"}}}}'
        ]


def _waiting(number: str, name: str) -> str:
    return f'"cat":"queue","id":"{number}","name":"{name}","pid":1,"tid":1'
