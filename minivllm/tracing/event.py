"""A step's record as one Chrome trace event, and back.

Moments are whole microseconds since the trace began. A request goes by a number, given in the ``arrived``
of the step that found it in the queue: its id would be ten times as long, in every step. Lists of requests
are strings, which a viewer shows in one line: the numbers of those that decode; of those that are admitted
or evicted, ``17@32`` for 32 cached or computed tokens; and ``17@32+480!`` for a prefill of 480 tokens from
position 32, after which the next token is sampled. How many tokens a decode finds in its KV cache follows
from the steps before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from minivllm.engine.steps import Admission, Arrival, Ending, Eviction, Prefill, StepRecord
from minivllm.request import FinishReason

PREFIX = '{"cat":"step",'
"""How the line of a step begins; that of no other event does."""
ENGINE_TID = 1
NEXT_TID = 2
"""Of a step that begins before the one before it is over."""


def microseconds(moment: float, origin: float) -> int:
    """A moment of the engine's clock as the trace has it."""
    return round((moment - origin) * 1e6)


def encode(record: StepRecord, numbers: Mapping[str, str], origin: float, tid: int) -> str:
    """The event, a line without its end. ``numbers``: of all requests in the record, by their ids."""
    moments = (
        record.schedule_time,
        record.execute_time,
        record.launched_time,
        record.wait_time,
        record.tokens_time,
        record.end_time,
        record.device_start,
    )
    start, execute, launched, wait, tokens, end, device = [microseconds(moment, origin) for moment in moments]
    kind = "mixed" if record.decodes and record.prefills else "decode" if record.decodes else "prefill"
    args = [
        f'"step":{record.number},"schedule_ms":{(execute - start) / 1e3},'
        f'"execute_ms":{(launched - execute) / 1e3},"wait_ms":{(tokens - wait) / 1e3},'
        f'"update_ms":{(end - tokens) / 1e3},"device_ms":{(tokens - device) / 1e3},'
        f'"running":{record.num_running},"waiting":{record.num_waiting},"blocks":{record.num_used_blocks}'
    ]
    if record.decodes:
        items = [numbers[request_id] for request_id in record.decodes]
        args.append(f'"decodes":"{" ".join(items)}"')
    if record.prefills:
        items = [
            f"{numbers[item.request_id]}@{item.start}+{item.num_tokens}{'!' if item.is_last else ''}"
            for item in record.prefills
        ]
        args.append(f'"prefills":"{" ".join(items)}"')
    if record.admitted:
        items = [f"{numbers[item.request_id]}@{item.num_cached_tokens}" for item in record.admitted]
        args.append(f'"admitted":"{" ".join(items)}"')
    if record.evicted:
        items = [f"{numbers[item.request_id]}@{item.num_computed_tokens}" for item in record.evicted]
        args.append(f'"evicted":"{" ".join(items)}"')
    if record.dropped:
        items = [numbers[request_id] for request_id in record.dropped]
        args.append(f'"dropped":"{" ".join(items)}"')
    others: dict[str, Any] = {}
    if record.waits_for is not None:
        others["waits_for"] = record.waits_for
    if record.error is not None:
        others["error"] = record.error
    if record.arrived:
        others["arrived"] = [
            {
                "number": int(numbers[item.request_id]),
                "id": item.request_id,
                "time": microseconds(item.time, origin),
                "queued_time": microseconds(item.queued_time, origin),
                "prompt_tokens": item.num_prompt_tokens,
                "max_new_tokens": item.max_new_tokens,
                "priority": item.priority,
                "client_id": item.client_id,
            }
            for item in record.arrived
        ]
    if record.ended:
        others["ended"] = [
            {
                "number": int(numbers[item.request_id]),
                "time": microseconds(item.time, origin),
                "reason": item.reason.value,
                "error": item.error,
            }
            for item in record.ended
        ]
    if others:
        args.append(json.dumps(others, separators=(",", ":"))[1:-1])
    return (
        f'{PREFIX}"name":"{kind if record.num_seqs else "none"}","ph":"X","pid":1,"tid":{tid},"ts":{start},'
        f'"dur":{end - start},"args":{{{",".join(args)}}}}}'
    )


class StepDecoder:
    """Makes records of a trace's lines again, one after the other."""

    def __init__(self) -> None:
        self._ids: dict[int, str] = {}
        """Of the requests that have arrived, by number."""
        self._num_computed: dict[str, int] = {}
        """Tokens in the KV cache, by id, for those that have run."""

    def __call__(self, line: str | bytes) -> StepRecord:
        """The record of a step, with times in seconds since the trace began.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, OverflowError or RecursionError: it isn't such a
                line, or not the next one.
        """
        event = json.loads(line)
        args = event["args"]
        start = int(event["ts"])
        end = start + int(event["dur"])

        def after(moment: int, phase: str, direction: int = 1) -> int:
            return moment + direction * round(float(args[phase]) * 1e3)

        execute, tokens = after(start, "schedule_ms"), after(end, "update_ms", -1)
        record = StepRecord(
            number=int(args["step"]),
            schedule_time=start / 1e6,
            execute_time=execute / 1e6,
            launched_time=after(execute, "execute_ms") / 1e6,
            wait_time=after(tokens, "wait_ms", -1) / 1e6,
            tokens_time=tokens / 1e6,
            end_time=end / 1e6,
            device_start=after(tokens, "device_ms", -1) / 1e6,
            waits_for=_text(args.get("waits_for")),
            num_waiting=int(args["waiting"]),
            num_running=int(args["running"]),
            num_used_blocks=int(args["blocks"]),
            error=_text(args.get("error")),
        )
        self._add_requests(record, args)
        return record

    def _add_requests(self, record: StepRecord, args: dict[str, Any]) -> None:
        for item in args.get("arrived", ()):
            self._ids[int(item["number"])] = str(item["id"])
            record.arrived.append(
                Arrival(
                    str(item["id"]),
                    int(item["time"]) / 1e6,
                    int(item["queued_time"]) / 1e6,
                    int(item["prompt_tokens"]),
                    int(item["max_new_tokens"]),
                    int(item["priority"]),
                    _text(item["client_id"]),
                )
            )
        for number, _, count in _items(args, "evicted"):
            record.evicted.append(Eviction(self._ids[number], count))
        for number, _, count in _items(args, "admitted"):
            record.admitted.append(Admission(self._ids[number], count))
            self._num_computed[self._ids[number]] = count
        for item in args.get("decodes", "").split():
            request_id = self._ids[int(item)]
            record.decodes[request_id] = self._num_computed[request_id]
            self._num_computed[request_id] += 1
        for number, rest, start in _items(args, "prefills"):
            request_id, num_tokens = self._ids[number], int(rest.rstrip("!"))
            record.prefills.append(Prefill(request_id, start, num_tokens, rest.endswith("!")))
            self._num_computed[request_id] = start + num_tokens
        record.dropped = [self._ids[int(number)] for number in args.get("dropped", "").split()]
        for item in args.get("ended", ()):
            request_id, time = self._ids[int(item["number"])], int(item["time"]) / 1e6
            record.ended.append(Ending(request_id, time, FinishReason(item["reason"]), _text(item["error"])))


def _items(args: dict[str, Any], key: str) -> Iterator[tuple[int, str, int]]:
    """``17@32+480`` as (17, "480", 32); of ``17@32`` the second is empty."""
    for item in args.get(key, "").split():
        number, _, rest = item.partition("@")
        position, _, num_tokens = rest.partition("+")
        yield int(number), num_tokens, int(position)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
