"""A trace in plain words: one request's life, and the run as a whole."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from minivllm.engine.steps import StepRecord
from minivllm.request import FinishReason
from minivllm.tracing.lives import NEXT_STEP, Life, Lives, Stay, Waits, add_up

_BECAUSE = {
    NEXT_STEP: "the next step had yet to begin",
    "blocks": "no blocks were free",
    "max_num_seqs": "as many requests ran as --max-num-seqs allows",
    "num_parallel": "as many requests ran as --num-parallel allows",
    "max_num_batched_tokens": "others took all of the steps' --max-num-batched-tokens",
    "last_token": "its last token was still being computed",
}
_ENDED = {
    FinishReason.STOP: "stop (it came to an end token)",
    FinishReason.LENGTH: "length (max_tokens, or the context, was reached)",
    FinishReason.ABORT: "abort (its client left, or it came to a stop string)",
    FinishReason.ERROR: "error",
    FinishReason.TIMEOUT: "timeout (its deadline passed)",
}
_AT_ONCE = 0.001
"""Seconds that nobody calls waiting."""
_MOST_SLOWEST = 10


def duration(seconds: float) -> str:
    """For people: ``0.2 ms``, ``35 ms``, ``1.2 s``, ``75 s``."""
    if seconds < 0.00995:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 0.995:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"


def count(number: int, noun: str) -> str:
    """``1 token``, ``2 tokens``, ``12,345 tokens``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def life_lines(life: Life, now: float) -> list[str]:
    """One request's life, up to its end or ``now``, when the trace ends."""
    arrival, first = life.arrival, life.stays[0]
    lines = [f"request {', '.join(arrival.ids)}"]
    lines.append(
        f"arrived at {arrival.time:.2f} s with a prompt of {count(arrival.num_prompt_tokens, 'token')}, "
        f"for at most {arrival.max_new_tokens:,} more"
    )
    if arrival.queued_time > arrival.time:
        lines.append(f"its grammar was compiled in {duration(arrival.queued_time - arrival.time)}")
    lines.append(_queued(first))
    if first.num_cached_tokens:
        num_cached = min(first.num_cached_tokens, arrival.num_prompt_tokens)
        lines.append(
            f"{num_cached:,} of its {arrival.num_prompt_tokens:,} prompt tokens were in the prefix cache"
        )
    if first.num_prefill_steps and first.admitted_time is not None:
        steps = count(first.num_prefill_steps, "step")
        if first.first_token_time is not None:
            took = duration(first.first_token_time - first.admitted_time)
            lines.append(f"its prefill took {steps}, {took}")
        else:
            lines.append(f"its prefill was not over after {steps}")
    if life.first_token_time is not None:
        lines.append(f"first token after {duration(life.first_token_time - arrival.time)}")
    if life.evictions:
        lines.append(_evicted(life))
    if life.num_output_tokens > 1 and life.first_token_time is not None:
        lines.append(_generated(life, life.first_token_time))
    lines.append(_ended(life, now))
    return [lines[0], *(f"  {line}" for line in lines[1:])]


def _queued(stay: Stay) -> str:
    if stay.admitted_time is None:
        return f"queued {_waited(stay.waits)}, and not admitted"
    if sum(stay.waits.values()) < _AT_ONCE:
        return "admitted at once"
    others = f" ({count(stay.num_running, 'request')} ran)" if set(stay.waits) != {NEXT_STEP} else ""
    return f"queued {_waited(stay.waits)}{others}"


def _waited(waits: Waits) -> str:
    """How long, and the reasons that took a tenth of the time or more."""
    total = sum(waits.values())
    reasons = [(word, seconds) for word, seconds in add_up([waits]).items() if seconds >= total / 10]
    if len(reasons) < 2:
        return f"{duration(total)} because {_because(reasons[0][0] if reasons else NEXT_STEP)}"
    parts = [f"{duration(seconds)} because {_because(word)}" for word, seconds in reasons]
    return f"{duration(total)}, of it {_listed(parts)}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _because(word: str) -> str:
    return _BECAUSE.get(word, f"of {word}")


def _evicted(life: Life) -> str:
    steps = [str(stay.evicted_step) for stay in life.evictions]
    times = "once, at step" if len(steps) == 1 else f"{len(steps)} times, at steps"
    return (
        f"evicted {times} {_listed(steps)}: waited {_waited(add_up(stay.waits for stay in life.stays[1:]))}, "
        f"and recomputed {count(life.num_recomputed_tokens, 'token')}"
    )


def _generated(life: Life, first_token_time: float) -> str:
    seconds = life.last_token_time - first_token_time
    text = (
        f"{count(life.num_output_tokens, 'token')} in {duration(seconds)}, "
        f"{duration(seconds / (life.num_output_tokens - 1))} each"
    )
    if life.slowest_step:
        text += f"; the slowest took {duration(life.slowest_gap)}, in step {life.slowest_step}"
        if life.slowest_prefill_tokens:
            text += f" beside {count(life.slowest_prefill_tokens, 'token')} of other prompts"
    return text


def _ended(life: Life, now: float) -> str:
    ending, tokens = life.ending, count(life.num_output_tokens, "token")
    if ending is None:
        state = "ran" if life.stays[-1].admitted_time is not None else "waited"
        return f"still {state} when the trace ended, at {now:.2f} s, with {tokens}"
    text = f"ended at {ending.time:.2f} s with {tokens}: {_ENDED[ending.reason]}"
    return text if ending.error is None else f"{text}: {ending.error}"


class Overview:
    """Figures of a whole trace; it keeps a few numbers of each step, and the lives of the requests."""

    def __init__(self) -> None:
        self.lives = Lives()
        self.end = 0.0
        self._num_prefill_tokens = self._num_evictions = self._num_failed = 0
        self._ms: dict[str, array[float]] = {
            name: array("d") for name in ("schedule", "execute", "wait", "update", "device")
        }

    def follow(self, record: StepRecord) -> None:
        """Take in one more step."""
        self.lives.follow(record)
        self.end = max(self.end, record.end_time)
        self._num_prefill_tokens += record.num_prefill_tokens
        self._num_evictions += len(record.evicted)
        self._num_failed += record.error is not None
        if record.num_seqs:
            seconds = (
                record.schedule_seconds,
                record.execute_seconds,
                record.wait_seconds,
                record.update_seconds,
                record.device_seconds,
            )
            for values, value in zip(self._ms.values(), seconds, strict=True):
                values.append(value * 1e3)

    def lines(self, header: dict[str, Any]) -> list[str]:
        """What ``minivllm trace summary FILE`` prints."""
        lives = self.lives.all
        num_steps = len(self._ms["device"])
        first = min((life.arrival.time for life in lives), default=self.end)
        output = sum(life.num_output_tokens for life in lives)
        lines = [
            f"minivllm {header.get('version')}, {header.get('model')} on {header.get('device')}, "
            f"{header.get('kv_blocks')} KV blocks; began {header.get('started')}",
            f"{duration(self.end - first)} from the first request on: {count(num_steps, 'step')}, "
            f"{count(self._num_prefill_tokens, 'prefill token')}, {count(output, 'token')} generated",
            f"{count(len(lives), 'request')}: {self._endings()}",
        ]
        if self._num_failed:
            lines.append(f"{count(self._num_failed, 'step')} failed")
        if not lives:
            return lines
        return [*lines, "", *self._phases(), "", *self._queueing(), "", *self._slowest()]

    def _endings(self) -> str:
        reasons = Counter(
            "unfinished" if life.ending is None else life.ending.reason.value for life in self.lives.all
        )
        return ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common()) or "none"

    def _phases(self) -> list[str]:
        rows: list[Sequence[str]] = [("ms per step", "p50", "p99", "most", "in all")]
        for name, values in self._ms.items():
            figures = [_percentile(values, 50), _percentile(values, 99), max(values, default=0.0)]
            rows.append((name, *(f"{value:.2f}" for value in figures), duration(sum(values) / 1e3)))
        return _table(rows)

    def _queueing(self) -> list[str]:
        lives = self.lives.all
        waits = [sum(life.stays[0].waits.values()) for life in lives]
        total = add_up(life.waits for life in lives)
        lines = [
            f"queued before the first step: p50 {duration(_percentile(waits, 50))}, "
            f"p99 {duration(_percentile(waits, 99))}, at most {duration(max(waits))}"
        ]
        all_seconds = sum(total.values())
        for word, seconds in total.items():
            if seconds >= all_seconds / 100 and seconds >= _AT_ONCE:
                lines.append(f"  {seconds / all_seconds:4.0%} of all waiting because {_because(word)}")
        cached = sum(life.stays[0].num_cached_tokens for life in lives)
        prompts = sum(life.arrival.num_prompt_tokens for life in lives)
        recomputed = sum(life.num_recomputed_tokens for life in lives)
        evicted = sum(bool(life.evictions) for life in lives)
        lines.append(f"in the prefix cache: {cached:,} of {count(prompts, 'prompt token')}")
        lines.append(
            f"evictions: {self._num_evictions:,}, of {count(evicted, 'request')}; "
            f"{count(recomputed, 'token')} recomputed"
        )
        return lines

    def _slowest(self) -> list[str]:
        ordered = sorted(
            self.lives.all, key=lambda life: life.end(self.end) - life.arrival.time, reverse=True
        )
        rows = [
            ("slowest requests", "seconds", "queued", "first token", "prompt", "tokens", "evicted", "ended")
        ]
        for life in ordered[:_MOST_SLOWEST]:
            first = life.first_token_time
            rows.append(
                (
                    life.request_id,
                    f"{life.end(self.end) - life.arrival.time:.2f}",
                    f"{sum(life.waits.values()):.2f}",
                    "-" if first is None else f"{first - life.arrival.time:.2f}",
                    f"{life.arrival.num_prompt_tokens:,}",
                    f"{life.num_output_tokens:,}",
                    str(len(life.evictions)),
                    "-" if life.ending is None else life.ending.reason.value,
                )
            )
        return _table(rows)


def _percentile(values: Sequence[float] | array[float], percent: float) -> float:
    """By nearest rank; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
