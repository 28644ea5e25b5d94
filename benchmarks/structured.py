"""Structured output: whether every answer is valid, and what the masks cost. The engine in this process.

    python benchmarks/structured.py [--answers 200] [--users 32] [--json FILE] [ENGINE FLAGS]

*Valid* is what a program outside says: the jsonschema package of JSON, Python's ``re`` of a regular
expression's answers, Python's own parser of arithmetic in a Lark grammar. All are sampled at temperature 1.

*Inter-token latency* is the time from step to step in which every one of ``--users`` sequences gets a token,
over rounds that alternate: with masks, without, with, ... Both kinds have the same prompts and number of
tokens; with masks, each answer is an endless array of objects after one of the schemas.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the schemas are those of the tests

from minivllm import LLM, EngineConfig, SamplingParams
from minivllm.completion import CompletionStream
from minivllm.config import option
from minivllm.flags import Parser
from minivllm.request import CompletionOutput, FinishReason
from minivllm.structured import grammar_from_json_schema, grammar_from_regex
from minivllm_bench import machine
from tests.structured.schemas import SCHEMAS, check_answer

REGEX = r"(https?)://[a-z]{3,10}\.(com|org)/[\w-]{1,12}\?id=\d{1,6}"
ARITHMETIC = """
start: term (OPERATOR term)~0..3
term: NUMBER | "(" term OPERATOR term ")"
OPERATOR: "+" | "-" | "*"
NUMBER: /[1-9][0-9]{0,4}/
"""


@dataclass(frozen=True, kw_only=True)
class StructuredConfig:
    """What is measured."""

    answers: int = option(200, "of each kind: JSON, regular expression, grammar")
    users: int = option(32, "sequences at once")
    rounds: int = option(4, "of latency, with masks and without")
    output_tokens: int = option(100, "in each answer of these rounds")
    json: str | None = option(None, "write the figures to this file, too")


class Bench:
    """An engine, and numbered requests for it."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._ids = map(str, itertools.count())

    def answers(self, asked: list[tuple[str, SamplingParams]], users: int) -> list[CompletionOutput]:
        """Complete chats, ``users`` at once."""
        engine, tokenizer = self._llm.engine, self._llm.tokenizer
        waiting = deque(enumerate(asked))
        streams: dict[str, CompletionStream] = {}
        ended: list[CompletionOutput] = []
        while waiting or streams:
            while waiting and len(streams) < users:
                index, (text, sampling) = waiting.popleft()
                prompt = tokenizer.encode_chat([{"role": "user", "content": text}])
                request_id = next(self._ids)
                streams[request_id] = CompletionStream(tokenizer, prompt, sampling, index)
                engine.add(request_id, prompt, sampling)
            for event in engine.step():
                if event.error is not None:
                    raise SystemExit(f"the engine failed: {event.error}")
                streams[event.request_id].push(event)
                if event.finish_reason is not None:
                    ended.append(streams.pop(event.request_id).output)
        return sorted(ended, key=lambda output: output.index)

    def latencies(self, params: list[SamplingParams]) -> list[float]:
        """Seconds from step to step while all of them decode."""
        engine = self._llm.engine
        for sampling in params:
            engine.add(next(self._ids), list(range(100, 160)), sampling)
        seconds: list[float] = []
        last = None
        while engine.has_work:
            events = engine.step()
            now = time.perf_counter()
            errors = [event.error for event in events if event.error is not None]
            if errors:
                raise SystemExit(f"the engine failed: {errors[0]}")
            if len(events) < len(params):
                last = None
                continue
            if last is not None:
                seconds.append(now - last)
            last = now
        return seconds


def validity(bench: Bench, settings: StructuredConfig) -> dict[str, dict[str, int]]:
    """How many answers of each kind ended, and how many of those are valid."""
    names = list(itertools.islice(itertools.cycle(SCHEMAS), settings.answers))

    def check_regex(_: int, text: str) -> None:
        if not re.fullmatch(REGEX, text):
            raise ValueError("no match")

    kinds: dict[str, tuple[Callable[[int], str], Callable[[int, str], object]]] = {
        "json_schema": (
            lambda i: grammar_from_json_schema(SCHEMAS[names[i]]),
            lambda i, text: check_answer(text, SCHEMAS[names[i]]),
        ),
        "regex": (lambda i: grammar_from_regex(REGEX), check_regex),
        "grammar": (lambda i: ARITHMETIC, lambda i, text: ast.parse(text, mode="eval")),
    }
    counts = {}
    for kind, (grammar_of, check) in kinds.items():
        asked = [
            (
                f"Write a document about {names[i]}.",
                SamplingParams(max_tokens=1000, seed=i, grammar=grammar_of(i)),
            )
            for i in range(settings.answers)
        ]
        outputs = bench.answers(asked, settings.users)
        for output in outputs:
            if output.finish_reason is not FinishReason.STOP:
                print(f"{kind} {output.index} unfinished: {output.text[-100:]!r}", file=sys.stderr)
        finished = [output for output in outputs if output.finish_reason is FinishReason.STOP]
        num_valid = 0
        for output in finished:
            try:
                check(output.index, output.text)
                num_valid += 1
            except Exception as error:
                print(f"{kind} {output.index}: {error}: {output.text!r}", file=sys.stderr)
        counts[kind] = {"asked": len(outputs), "finished": len(finished), "valid": num_valid}
        print(f"{kind:>12}: {len(outputs)} asked, {len(finished)} finished, {num_valid} valid", flush=True)
    return counts


def main(argv: list[str]) -> None:
    parser = Parser("benchmarks/structured.py", "Validity and cost of structured output.")
    parser.add_config(StructuredConfig, "benchmark")
    parser.add_config(EngineConfig, "engine")
    parsed = parser.parse(argv)
    settings = parser.make_config(StructuredConfig, parsed)
    config = parser.make_config(EngineConfig, parsed)
    busy = machine.warn_if_busy()

    bench = Bench(LLM(**vars(config)))
    counts = validity(bench, settings)

    schemas: list[dict[str, Any]] = [
        {"type": "array", "items": {k: v for k, v in schema.items() if k != "$defs"}, "minItems": 10_000}
        | {k: v for k, v in schema.items() if k == "$defs"}
        for schema in SCHEMAS.values()
    ]
    free = [
        SamplingParams(max_tokens=settings.output_tokens, seed=i, ignore_eos=True)
        for i in range(settings.users)
    ]
    masked = [
        replace(sampling, grammar=grammar_from_json_schema(schema))
        for sampling, schema in zip(free, itertools.cycle(schemas), strict=False)
    ]
    bench.latencies([replace(sampling, max_tokens=8) for sampling in masked])  # warm-up: grammars compiled
    rounds: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    for _ in range(settings.rounds):
        for kind, params in (("with", masked), ("without", free)):
            milliseconds = sorted(1e3 * seconds for seconds in bench.latencies(params))
            rounds[kind].append(
                {
                    "mean": statistics.fmean(milliseconds),
                    "median": statistics.median(milliseconds),
                    "p99": milliseconds[int(0.99 * len(milliseconds))],
                }
            )
            print(f"{kind:>8}: {_cells(rounds[kind][-1])}", flush=True)
    medians = {
        kind: {name: statistics.median(entry[name] for entry in entries) for name in entries[0]}
        for kind, entries in rounds.items()
    }
    rise = {name: medians["with"][name] / medians["without"][name] - 1 for name in medians["with"]}
    print(
        "inter-token latency rises by " + ", ".join(f"{share:+.1%} ({name})" for name, share in rise.items())
    )
    if settings.json is not None:
        report = {
            "machine": machine.describe(),
            "busy": busy,
            "commit": machine.revision(Path(__file__).parent),
            "benchmark": vars(settings),
            "engine": vars(config),
            "answers": counts,
            "milliseconds": rounds,
            "rise": rise,
        }
        Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")


def _cells(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} ms" for name, value in figures.items())


if __name__ == "__main__":
    main(sys.argv[1:])
