"""``minivllm bench compare``: the engine's modes, and peers, from one user to many; writes a report."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import functools
import shlex
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

import minivllm
from minivllm.child import child_environment
from minivllm.errors import ConfigError, MinivllmError
from minivllm.flags import Parser
from minivllm_bench import machine, results
from minivllm_bench.client import Client
from minivllm_bench.compare_config import MODES, QUICK, CompareConfig
from minivllm_bench.generator import Ask
from minivllm_bench.points import measure_agents, measure_point, read_health
from minivllm_bench.prompts import Conversation, TextSource
from minivllm_bench.results import AgentRun, Comparison, Contender, Point
from minivllm_bench.servers import ContenderError, Process, start_server
from minivllm_bench.sweep import Budget, sweep
from minivllm_bench.workloads import WORKLOADS, Session, Turn

Result = TypeVar("Result")


def main(argv: list[str]) -> int:
    """Measure, and write the report. Returns 1 where a contender failed, 130 after Ctrl-C."""
    config = _parse(argv)
    budget = Budget(time.monotonic() + config.total_seconds)
    models = {name: Http(url).check() for name, url in config.peers.items()}
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {config.output}: {error.strerror}") from None
    comparison = _new(config, argv, models)

    def save() -> None:
        results.save(comparison, folder / "compare.json")

    # As Ctrl-C: servers are stopped, and what there is becomes a report.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    try:
        with _Bar(config, budget) as begin:
            measure(comparison, config, budget, begin, save)
        comparison["is_complete"] = True
    except KeyboardInterrupt:
        print("broken off; the report has what there is", file=sys.stderr)
    comparison["seconds"] = time.monotonic() - started
    save()
    _write_report(comparison, folder)
    for contender in comparison["contenders"]:
        if contender["failed"] is not None:
            print(f"{contender['label']} failed: {contender['failed']}", file=sys.stderr)
    if not comparison["is_complete"]:
        return 130
    return int(any(contender["failed"] is not None for contender in comparison["contenders"]))


def measure(
    comparison: Comparison,
    config: CompareConfig,
    budget: Budget,
    begin: Callable[[str], None],
    save: Callable[[], None],
) -> None:
    """All contenders, one after the other. One that fails says so in the comparison, and the others go on."""
    for place, contender in enumerate(comparison["contenders"]):
        share = budget.share(len(comparison["contenders"]) - place)
        with ExitStack() as exits:
            process = None
            url = config.peers.get(contender["name"], "")
            try:
                if not contender["is_peer"]:
                    begin(f"{contender['label']}, starting")
                    server = start_server(config.server_command(contender["name"]), child_environment())
                    process, url = server.process, server.url
                    exits.callback(process.stop)
                    contender["start_seconds"] = server.start_seconds
                model = Http(url).check()
                if not contender["is_peer"]:
                    comparison["model"] = model
            except MinivllmError as error:
                contender["failed"] = str(error)
            target = Http(url, process=process, workload=config.workload)
            sweep(contender, target, config, share, begin=begin, save=save)


class Http:
    """A server that runs."""

    def __init__(self, url: str, *, process: Process | None = None, workload: str = "memoryless") -> None:
        self._url = url
        self._process = process
        self._workload = WORKLOADS[workload]

    def check(self) -> str:
        """Its model's name, once it has answered a request. Raises MinivllmError where it doesn't."""

        async def check() -> str:
            async with Client(self._url) as client:
                name = await client.find_model()
                conversation = Conversation(TextSource(0), 0, Session(()))
                conversation.ask(Turn(16, 2))
                await client.probe(conversation)
                return name

        return asyncio.run(check())

    def point(self, users: int, warm_up: float, seconds: float, seed: int) -> Point:
        """See :class:`minivllm_bench.sweep.Target`."""

        def measure(ask: Ask) -> Coroutine[Any, Any, Point]:
            health = functools.partial(read_health, self._url)
            return measure_point(
                ask, health, self._workload, users=users, warm_up=warm_up, seconds=seconds, seed=seed
            )

        return self._run(measure)

    def agents(self, users: int, steps: int, limit: float, seed: int) -> AgentRun:
        """See :class:`minivllm_bench.sweep.Target`."""
        return self._run(lambda ask: measure_agents(ask, users=users, steps=steps, limit=limit, seed=seed))

    def _run(self, measure: Callable[[Ask], Coroutine[Any, Any, Result]]) -> Result:
        async def run() -> Result:
            async with Client(self._url) as client:
                await client.find_model()
                return await measure(client.ask)

        try:
            return asyncio.run(run())
        except MinivllmError as error:
            if self._process is not None and self._process.has_ended:
                raise self._process.failed("the server ended") from error
            raise ContenderError(str(error)) from error


def _parse(argv: list[str]) -> CompareConfig:
    parser = Parser("minivllm bench compare", "Measure the engine's modes, and peers, and write a report.")
    parser.add_config(CompareConfig, "comparison")
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"two minutes: other defaults, {quick}")
    given = vars(parser.parse(argv))
    defaults = QUICK if given["quick"] else {}
    return parser.make_config(CompareConfig, argparse.Namespace(**{**defaults, **given}))


def _new(config: CompareConfig, argv: list[str], models: dict[str, str]) -> Comparison:
    contenders = [
        _contender(
            name,
            MODES[name].label,
            machine.without_folders(["minivllm", "serve", *config.server_flags(name)]),
        )
        for name in config.mode_names
    ]
    for name, url in config.peers.items():
        contenders.append({**_contender(name, f"{name} ({models[name]})", [url]), "is_peer": True})
    root = Path(minivllm.__file__).parent
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(machine.without_folders(["minivllm", "bench", "compare", *argv])),
        "version": f"{minivllm.__version__}, commit {machine.revision(root)}",
        "model": config.model or "",
        "settings": {**asdict(config), "output": Path(config.output).name},
        "machine": machine.describe(),
        "busy_processes": machine.warn_if_busy(),
        "seconds": None,
        "is_complete": False,
        "contenders": contenders,
    }


def _contender(name: str, label: str, command: list[str]) -> Contender:
    return {
        "name": name,
        "label": label,
        "is_peer": False,
        "command": command,
        "start_seconds": None,
        "failed": None,
        "points": [],
        "agents": [],
    }


class _Bar:
    """A progress bar that says what is measured, and how long all may still take."""

    def __init__(self, config: CompareConfig, budget: Budget) -> None:
        contenders = len(config.mode_names) + len(config.peers)
        points = len(config.user_counts) + len(config.agent_user_counts)
        self._budget = budget
        self._is_first = True
        self._bar = tqdm(
            total=contenders * points + len(config.mode_names),
            bar_format="{desc:<44} |{bar:20}| {n_fmt}/{total_fmt}{postfix}",
        )

    def __enter__(self) -> Callable[[str], None]:
        return self._begin

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._bar.update(1)
        self._bar.close()

    def _begin(self, what: str) -> None:
        left = max(0, round(self._budget.left()))
        self._bar.set_description_str(what, refresh=False)
        self._bar.set_postfix_str(f"at most {left // 60}:{left % 60:02} left", refresh=False)
        self._bar.update(0 if self._is_first else 1)
        self._is_first = False


def _write_report(comparison: Comparison, folder: Path) -> None:
    from minivllm_bench.report import write_report

    for path in write_report(comparison, folder):
        print(path)
