"""A step's record as one Chrome trace event, and back.

Moments are whole microseconds since the trace began. A request goes by a number, given in the ``arrived``
of the step that found it in the queue: its id would be ten times as long, in every step. Lists of requests
are strings, which a viewer shows in one line: ``3@1021`` is request 3 with 1,021 tokens in its KV cache
before, and ``17@0+512!`` a prefill of 512 tokens from position 0, of which the next token is sampled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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


def encode(record: StepRecord, numbers: Mapping[str, int], origin: float, tid: int) -> str:
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
        items = [f"{numbers[request_id]}@{context}" for request_id, context in record.decodes.items()]
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
        items = [str(numbers[request_id]) for request_id in record.dropped]
        args.append(f'"dropped":"{" ".join(items)}"')
    others: dict[str, Any] = {}
    if record.waits_for is not None:
        others["waits_for"] = record.waits_for
    if record.error is not None:
        others["error"] = record.error
    if record.arrived:
        others["arrived"] = [
            {
                "number": numbers[item.request_id],
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
                "number": numbers[item.request_id],
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


def decode(line: str | bytes, ids: dict[int, str]) -> StepRecord:
    """The record, with times in seconds since the trace began.

    Args:
        ids: by request number; those of requests that arrived are added.

    Raises:
        ValueError, KeyError, TypeError, AttributeError or RecursionError: it isn't such a line.
    """
    event = json.loads(line)
    args = event["args"]
    for item in args.get("arrived", ()):
        ids[item["number"]] = str(item["id"])

    def name(number: int | str) -> str:
        return ids[int(number)]

    def pairs(key: str) -> list[tuple[str, int]]:
        items = [item.split("@") for item in args.get(key, "").split()]
        return [(name(number), int(count)) for number, count in items]

    def after(moment: int, phase: str, direction: int = 1) -> int:
        return moment + direction * round(float(args[phase]) * 1e3)

    start, end = int(event["ts"]), int(event["ts"]) + int(event["dur"])
    execute, tokens = after(start, "schedule_ms"), after(end, "update_ms", -1)
    error, waits_for = args.get("error"), args.get("waits_for")
    return StepRecord(
        number=int(args["step"]),
        schedule_time=start / 1e6,
        execute_time=execute / 1e6,
        launched_time=after(execute, "execute_ms") / 1e6,
        wait_time=after(tokens, "wait_ms", -1) / 1e6,
        tokens_time=tokens / 1e6,
        end_time=end / 1e6,
        device_start=after(tokens, "device_ms", -1) / 1e6,
        decodes=dict(pairs("decodes")),
        prefills=[_prefill(item, name) for item in args.get("prefills", "").split()],
        arrived=[
            Arrival(
                str(item["id"]),
                int(item["time"]) / 1e6,
                int(item["queued_time"]) / 1e6,
                int(item["prompt_tokens"]),
                int(item["max_new_tokens"]),
                int(item["priority"]),
                None if item["client_id"] is None else str(item["client_id"]),
            )
            for item in args.get("arrived", ())
        ],
        admitted=[Admission(*pair) for pair in pairs("admitted")],
        evicted=[Eviction(*pair) for pair in pairs("evicted")],
        ended=[
            Ending(
                name(item["number"]),
                int(item["time"]) / 1e6,
                FinishReason(item["reason"]),
                None if item["error"] is None else str(item["error"]),
            )
            for item in args.get("ended", ())
        ],
        dropped=[name(number) for number in args.get("dropped", "").split()],
        waits_for=None if waits_for is None else str(waits_for),
        num_waiting=int(args["waiting"]),
        num_running=int(args["running"]),
        num_used_blocks=int(args["blocks"]),
        error=None if error is None else str(error),
    )


def _prefill(item: str, name: Callable[[str], str]) -> Prefill:
    number, _, rest = item.partition("@")
    start, _, num_tokens = rest.partition("+")
    return Prefill(name(number), int(start), int(num_tokens.rstrip("!")), num_tokens.endswith("!"))
