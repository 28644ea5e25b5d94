"""The same work on minivllm's server and on its peers, in the same run, on the same model file.

    python benchmarks/peers.py --llama-server PATH --openvino-python PATH --output FILE

Every contender gets the embedded model (a 4-bit GGUF file) and all cores, stays up for the whole
run, and takes its turn at every workload of every round with the same prompts; whoever isn't
installed or given is left out, and the results say so. Prompts are random words that are one token
each, new ones for each turn: no two begin alike, and no prefix cache finds anything.

    N users      N prompts at once, 100 tokens each, 100 output tokens each: output tokens per
                 second, from the first request sent to the last answer received
    decode       one user's output tokens per second, its prompt's time taken off
    prefill NxL  N prompts at once, L tokens each, 1 output token each: prompt tokens per second

minivllm, llama.cpp's server and servers given with --url answer over HTTP; libraries run in child
processes and are spared that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load import Contender, Library, Prompt, connect, start_http_server

import minivllm
from minivllm.tokenizer.load import load_tokenizer
from minivllm.weights.files import resolve_model
from minivllm_bench import machine
from minivllm_bench.servers import ContenderError

ROOT = Path(__file__).resolve().parents[1]
MINIVLLM = "minivllm"
CORES = os.cpu_count() or 1
DECODE_TOKENS = 200
PREFILLS = ((1, 1000), (8, 500))
"""Prompts at once, and tokens in each."""

Start = Callable[[], Contender]
WarmUp = Callable[[Contender], None]
Rounds = dict[str, dict[str, list[dict[str, Any]]]]
"""The turns of each contender at each workload."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts that are handed over at once, and what is counted."""

    name: str
    counted: str
    """"output", "decode" or "prompt" tokens per second."""
    users: int
    prompt_tokens: int
    output_tokens: int


def workloads(args: argparse.Namespace) -> list[Workload]:
    """All that is measured, in order."""
    length, output = args.prompt_tokens, args.output_tokens
    return [
        *(Workload(f"{n} user{'s' * (n > 1)}", "output", n, length, output) for n in args.users),
        Workload("decode", "decode", 1, length, DECODE_TOKENS),
        *(Workload(f"prefill {n}x{length}", "prompt", n, length, 1) for n, length in PREFILLS),
    ]


class Words:
    """Makes prompts out of words that are one token each, so that text and token ids say the same."""

    def __init__(self, model: str | None, seed: int) -> None:
        tokenizer = load_tokenizer(resolve_model(model))
        texts = {token_id: tokenizer.decode([token_id]) for token_id in range(tokenizer.vocab_size)}
        self._text_of = {
            token_id: text
            for token_id, text in texts.items()
            if text[:1] == " " and len(text) > 3 and text[1:].isascii() and text[1:].isalpha()
        }
        self._encode = tokenizer.encode
        self._random = random.Random(seed)

    def prompts(self, count: int, num_tokens: int) -> list[Prompt]:
        """``count`` prompts of exactly ``num_tokens`` tokens, no two with the same first word."""
        ids = list(self._text_of)
        return [
            self._prompt([first, *self._random.sample(ids, num_tokens - 1)])
            for first in self._random.sample(ids, count)
        ]

    def _prompt(self, token_ids: list[int]) -> Prompt:
        text = "".join(map(self._text_of.__getitem__, token_ids))
        if self._encode(text) != token_ids:
            raise SystemExit("this model's tokenizer doesn't read the words as one token each")
        return Prompt(text, token_ids)


def measure(contender: Contender, workload: Workload, turns: list[list[Prompt]]) -> dict[str, Any]:
    """One turn of one contender: its rate, in tokens per second, and what it was made of."""
    seconds, prompt_tokens = _timed(contender, turns[0], workload.output_tokens)
    details = {"seconds": round(seconds, 4), "prompt_tokens": prompt_tokens}
    if workload.counted == "prompt":
        return {"rate": prompt_tokens / seconds, **details}
    if workload.counted == "output":
        return {"rate": workload.users * workload.output_tokens / seconds, **details}
    first = statistics.median(_timed(contender, prompts, 1)[0] for prompts in turns[1:])
    rate = (workload.output_tokens - 1) / (seconds - first)
    return {"rate": rate, **details, "seconds_to_first_token": round(first, 4)}


def _timed(contender: Contender, prompts: list[Prompt], max_tokens: int) -> tuple[float, int]:
    """Seconds, and prompt tokens in all. Raises ContenderError where tokens are missing."""
    time.sleep(0.3)  # whoever ran before may have threads that still spin
    answers = contender.run(prompts, max_tokens)
    if answers.output_tokens != [max_tokens] * len(prompts):
        raise ContenderError(
            f"answers must have {max_tokens} tokens, got {min(answers.output_tokens, default=0)} "
            f"to {max(answers.output_tokens, default=0)} in {len(answers.output_tokens)} answers"
        )
    return answers.seconds, sum(answers.prompt_tokens)


def candidates(args: argparse.Namespace, model: Path) -> Iterator[tuple[str, Start | str]]:
    """Each contender's name, with how to start it, or why it can't be."""
    yield (
        MINIVLLM,
        lambda: start_http_server(
            [sys.executable, "-m", "minivllm.serve", "--model", str(model), *shlex.split(args.minivllm_args)],
            f"{minivllm.__version__}, commit {machine.revision(Path(minivllm.__file__).parent)}",
            {},
        ),
    )
    if not args.llama_server:
        yield "llama.cpp", "no --llama-server"
    for given in args.llama_server:
        name, _, path = given.rpartition("=")
        yield name or "llama.cpp", lambda path=path: _llama_server(path, args, model)  # type: ignore[misc]
    for name in ("openvino-genai", "llama-cpp-python", "transformers"):
        python = getattr(args, f"{name.split('-genai')[0].replace('-', '_')}_python")
        yield name, lambda name=name, python=python: Library(name, python, model, CORES)  # type: ignore[misc]
    for given in args.url:
        name, _, url = given.partition("=")
        yield name, lambda url=url: connect(url)  # type: ignore[misc]


def _llama_server(path: str, args: argparse.Namespace, model: Path) -> Contender:
    """llama.cpp's server with a slot for each user, and without anything kept between requests."""
    slots = max(*args.users, *(users for users, _ in PREFILLS))
    longest = max(args.prompt_tokens + max(args.output_tokens, DECODE_TOKENS), *(n + 1 for _, n in PREFILLS))
    context = slots * -(-longest // 256) * 256  # each slot gets a part, in steps of 256
    command = [path, "--model", str(model), "--threads", str(CORES), "--parallel", str(slots)]
    command += ["--ctx-size", str(context), "--no-cache-prompt", "--cache-ram", "0"]
    command += shlex.split(args.llama_args)
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ContenderError(f"can't be started: {error}") from error
    version = " ".join((shown.stdout + shown.stderr).split())
    # Of its ways to sample greedily the cheapest: the default chain runs over the whole vocabulary.
    return start_http_server(command, version, {"cache_prompt": False, "samplers": ["top_k"], "top_k": 1})


def start_all(
    starts: Iterator[tuple[str, Start | str]], skip: list[str], warm_up: WarmUp, exits: ExitStack
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run, started and warmed up, and why each of the others doesn't."""
    contenders: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for name, start in starts:
        if name in skip:
            left_out[name] = "--skip"
        elif isinstance(start, str):
            left_out[name] = start
        else:
            say(f"starting {name}")
            try:
                contender = start()
                exits.callback(contender.close)
                warm_up(contender)
                contenders[name] = contender
            except ContenderError as error:
                left_out[name] = str(error)
        if name in left_out:
            say(f"{name} is left out: {left_out[name]}")
    return contenders, left_out


def summary(rounds: Rounds) -> dict[str, dict[str, Any]]:
    """Median, least and most of each workload and contender, and minivllm's rate in multiples of it."""
    results: dict[str, dict[str, Any]] = {}
    for workload, turns_of in rounds.items():
        results[workload] = {}
        for name, turns in turns_of.items():
            rates = [turn["rate"] for turn in turns if "rate" in turn]
            if len(rates) == len(turns) > 0:
                middle = statistics.median(rates)
                results[workload][name] = {"median": middle, "min": min(rates), "max": max(rates)}
        ours = results[workload].get(MINIVLLM)
        for name, theirs in results[workload].items():
            if ours is not None and name != MINIVLLM:
                theirs["minivllm is times as fast"] = round(ours["median"] / theirs["median"], 3)
    return results


def table(results: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Workloads down, contenders across: tokens per second, least to most, and minivllm's multiple."""
    cells = [["tokens/s", *names]]
    for workload, result in results.items():
        cells.append([workload, *(_cell(result.get(name)) for name in names)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
    )


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "failed"
    text = f"{result['median']:.1f} ({result['min']:.1f} to {result['max']:.1f})"
    times = result.get("minivllm is times as fast")
    return text if times is None else f"{text} {times:5.2f}x"


def say(text: str) -> None:
    """Progress goes to standard error, results to standard output."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    args = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # stops the contenders, too
    busy = {"at start": machine.warn_if_busy()}
    if busy["at start"] and not args.even_if_busy:
        raise SystemExit("not measured; --even-if-busy measures all the same")
    model = resolve_model(args.model).path
    words, work = Words(args.model, args.seed), workloads(args)

    def warm_up(contender: Contender) -> None:
        for workload in work:
            prompts = words.prompts(workload.users, workload.prompt_tokens)
            contender.run(prompts, min(workload.output_tokens, 8))

    with ExitStack() as exits:
        contenders, left_out = start_all(candidates(args, model), args.skip, warm_up, exits)
        if not contenders:
            raise SystemExit("no contender could be started")
        report: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(machine.without_folders([sys.executable, *sys.argv])),
            "machine": machine.describe(),
            "busy processes": busy,
            "model": model.name,
            "contenders": {
                n: {"version": c.version, "command": machine.without_folders(c.command)}
                for n, c in contenders.items()
            },
            "left out": left_out,
            "workloads": {workload.name: asdict(workload) for workload in work},
            "unit": "tokens per second",
        }
        rounds: Rounds = {workload.name: {name: [] for name in contenders} for workload in work}
        for number in range(args.rounds):
            busy[f"before round {number + 1}"] = machine.warn_if_busy()
            for workload in work:
                turns = [words.prompts(workload.users, workload.prompt_tokens) for _ in range(4)]
                first = number % len(contenders)  # another one goes first in each round
                for name in [*contenders][first:] + [*contenders][:first]:
                    try:
                        turn = measure(contenders[name], workload, turns)
                        say(f"round {number + 1}, {workload.name}, {name}: {turn['rate']:.1f} tokens/s")
                    except ContenderError as error:
                        turn = {"error": str(error)}
                        say(f"round {number + 1}, {workload.name}, {name} failed: {error}")
                    rounds[workload.name][name].append(turn)
            # Written after each round, so that an interrupted run leaves what it has.
            report |= {"results": summary(rounds), "rounds": rounds}
            if args.output is not None:
                args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["results"], list(contenders)))
    print("median (least to most) over rounds; beside each peer, how many times as fast minivllm is")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The same work on minivllm's server and its peers.")
    add = parser.add_argument
    add("--users", type=_numbers, default=[1, 8, 32, 50], help="prompts at once (default: 1,8,32,50)")
    add("--prompt-tokens", type=int, default=100, help="in each user's prompt (default: 100)")
    add("--output-tokens", type=int, default=100, help="in each user's answer (default: 100)")
    add("--rounds", type=int, default=3, help="turns of each contender; medians are shown (default: 3)")
    add("--seed", type=int, default=0, help="of the prompts' words (default: 0)")
    add("--model", help="a .gguf file (default: the embedded SmolLM2-135M-Instruct)")
    add("--minivllm-args", default="", metavar="FLAGS", help="further flags for minivllm serve")
    add(
        "--llama-server",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="llama.cpp's llama-server; give several builds of it names",
    )
    add("--llama-args", default="", metavar="FLAGS", help="further flags for each llama-server")
    for name in ("openvino", "llama-cpp-python", "transformers"):
        what = "Python that has it (default: this one)"
        flag = f"--{name}-python"
        add(flag, default=sys.executable, metavar="PATH", help=what)
    add("--url", action="append", default=[], metavar="NAME=URL", help="a server with OpenAI's routes")
    add("--skip", action="append", default=[], metavar="NAME", help="leave a contender out")
    add("--even-if-busy", action="store_true", help="measure though other programs take CPU time")
    add("--output", type=Path, metavar="FILE", help="write every turn to this file, too")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
