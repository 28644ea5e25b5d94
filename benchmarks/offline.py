"""The engine alone, in this process: no HTTP, no tokenizer, no second process.

    python benchmarks/offline.py [--users 1,8,32] [--json FILE] [ENGINE FLAGS]

For each number of users, that many random prompts are queued at once, each to be answered with
exactly ``--output-tokens`` tokens, greedily:

    prefill      prompt tokens per second of a run that stops after one token each
    decode       output tokens per second of those steps in which every sequence only decoded
    end to end   output tokens per second from the first step to the last
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minivllm import LLM, EngineConfig, SamplingParams
from minivllm.config import option
from minivllm.engine.engine import Engine
from minivllm.flags import Parser
from minivllm_bench import machine


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """What is measured."""

    users: str = option("1,8,32", "sequences at once")
    prompt_tokens: int = option(100, "in each prompt")
    output_tokens: int = option(100, "in each answer")
    rounds: int = option(3, "runs of each; medians are shown")
    json: str | None = option(None, "write every round to this file, too")


class Bench:
    """An engine, and the random prompts that it is given."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self._request_ids = map(str, itertools.count())

    def round(self, users: int, prompt_tokens: int, output_tokens: int) -> dict[str, float]:
        """Tokens per second of each kind."""
        start = time.perf_counter()
        self._add(users, prompt_tokens, 1)
        for _ in self._steps():
            pass
        prefill = users * prompt_tokens / (time.perf_counter() - start)

        start = time.perf_counter()
        self._add(users, prompt_tokens, output_tokens)
        decoding = [step for step in self._steps() if step[2]]
        rates = {"prefill": prefill}
        if decoding:
            rates["decode"] = sum(tokens for tokens, _, _ in decoding) / sum(s for _, s, _ in decoding)
        rates["end to end"] = users * output_tokens / (time.perf_counter() - start)
        return rates

    def _add(self, users: int, prompt_tokens: int, output_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        vocabulary = range(self._engine.info.vocab_size)
        for _ in range(users):
            prompt = self._random.choices(vocabulary, k=prompt_tokens)
            self._engine.add(next(self._request_ids), prompt, sampling)

    def _steps(self) -> Iterator[tuple[int, float, bool]]:
        """Run until nothing is left. Of each step: new tokens, seconds, whether all had begun before."""
        begun: set[str] = set()
        while self._engine.has_work:
            start = time.perf_counter()
            events = self._engine.step()
            seconds = time.perf_counter() - start
            for event in events:
                if event.error is not None:
                    raise SystemExit(f"the engine failed: {event.error}")
            ended = sum(event.finish_reason is not None for event in events)
            took_part = {event.request_id for event in events}
            # A sequence without a token is in the midst of its prompt.
            is_decode = took_part <= begun and len(events) == self._engine.stats().num_running + ended
            begun |= took_part
            yield sum(len(event.new_token_ids) for event in events), seconds, is_decode


def main(argv: list[str]) -> None:
    parser = Parser("benchmarks/offline.py", "Throughput of the engine in this process.")
    parser.add_config(OfflineConfig, "benchmark")
    parser.add_config(EngineConfig, "engine")
    parser.add_preset()
    parsed = parser.parse(argv)
    offline = parser.make_config(OfflineConfig, parsed)
    config = parser.make_config(EngineConfig, parsed)
    machine.warn_if_busy()

    bench = Bench(LLM(**vars(config)).engine, config.seed or 0)
    bench.round(2, offline.prompt_tokens, 8)  # warm-up
    results: dict[str, list[dict[str, float]]] = {}
    print(f"{'tokens/s':>10} {'prefill':>26} {'decode':>26} {'end to end':>26}")
    for users in map(int, offline.users.split(",")):
        rounds = [
            bench.round(users, offline.prompt_tokens, offline.output_tokens) for _ in range(offline.rounds)
        ]
        results[str(users)] = rounds
        cells = [
            _cell([rates[kind] for rates in rounds if kind in rates])
            for kind in ("prefill", "decode", "end to end")
        ]
        print(f"{users:>4} users " + " ".join(f"{cell:>26}" for cell in cells), flush=True)
    print(
        f"median (least to most) of {offline.rounds} rounds, {offline.prompt_tokens} prompt tokens "
        f"and {offline.output_tokens} output tokens each"
    )
    if offline.json is not None:
        report = {
            "machine": machine.describe(),
            "commit": machine.revision(Path(__file__).parent),
            "benchmark": vars(offline),
            "engine": vars(config),
            "rounds": results,
        }
        Path(offline.json).write_text(json.dumps(report, indent=1) + "\n")


def _cell(rates: list[float]) -> str:
    if not rates:
        return "-"
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


if __name__ == "__main__":
    main(sys.argv[1:])
