"""``minivllm bench serve``: put a load on a server with OpenAI's routes, and measure what its users see."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.config import option
from minivllm.errors import ConfigError, MinivllmError
from minivllm.flags import Parser
from minivllm_bench import machine
from minivllm_bench.generator import LoadGenerator
from minivllm_bench.jsonl import find_workload
from minivllm_bench.load import Load
from minivllm_bench.metrics import Goals, summarise
from minivllm_bench.progress import show_progress
from minivllm_bench.prompts import Conversation, TextSource
from minivllm_bench.records import RequestRecord
from minivllm_bench.table import render
from minivllm_bench.workloads import WORKLOADS, Session, Turn

if TYPE_CHECKING:
    from minivllm_bench.client import Client

DEFAULT_USERS = 8
DEFAULT_NUM_REQUESTS = 100


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Which server, with what, and against which limits."""

    url: str = option("http://127.0.0.1:8000", "the server's, with or without /v1")
    model: str | None = option(None, "as the server calls it (default: the first that it lists)")
    endpoint: str = option("completions", "which route the requests take", choices=("completions", "chat"))
    workload: str = option(
        "fixed", f"{', '.join(WORKLOADS)}, or a .jsonl file with a prompt and output_tokens in each line"
    )
    goal_ttft: float | None = option(
        None, "milliseconds to the first token that count as good (default: any number does)"
    )
    goal_tpot: float | None = option(
        None, "milliseconds per token after the first that count as good (default: any number does)"
    )
    goal_e2e: float | None = option(
        None, "milliseconds to the whole answer that count as good (default: any number does)"
    )
    temperature: float = option(0.0, "of each request; 0: greedy")
    timeout: float = option(600.0, "seconds after which a request has failed")
    extra_body: str = option("{}", "JSON: more fields of each request; a null leaves a field out")
    api_key: str | None = option(
        None,
        "sent as a bearer token (default: the environment's OPENAI_API_KEY, unless the URL has a user)",
        is_secret=True,
    )
    output: str | None = option(None, "a JSON file for all figures and requests (default: none)")

    def __post_init__(self) -> None:
        for name in ("goal_ttft", "goal_tpot", "goal_e2e", "timeout"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
        if not self.temperature >= 0:
            raise ConfigError(f"--temperature must be at least 0, got {self.temperature:g}")
        self.extra_fields()
        if self.output is not None:
            path = Path(self.output)
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                raise ConfigError(f"--output {path} can't be written")

    def extra_fields(self) -> dict[str, Any]:
        """What ``extra_body`` says. Raises ConfigError."""
        try:
            fields = json.loads(self.extra_body)
        except ValueError as error:
            raise ConfigError(f"--extra-body is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"--extra-body must be a JSON object, got {self.extra_body}")
        return fields

    @property
    def goals(self) -> Goals | None:
        """In seconds; None where there are none."""
        goals = Goals(
            *(None if ms is None else ms / 1000 for ms in (self.goal_ttft, self.goal_tpot, self.goal_e2e))
        )
        return None if goals == Goals() else goals


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code: 1 where nothing, or not all, could be measured."""
    parser = Parser("minivllm bench serve", "Put a load on a server, and measure what its users see.")
    parser.add_config(ServeConfig, "what is measured")
    parser.add_config(Load, "load")
    parsed = parser.parse(argv)
    config = parser.make_config(ServeConfig, parsed)
    workload, num_requests = find_workload(config.workload)
    if "users" not in parsed and "rate" not in parsed:
        parsed.users = DEFAULT_USERS
    if "num_requests" not in parsed and "duration" not in parsed:
        parsed.num_requests = num_requests or DEFAULT_NUM_REQUESTS
    load = parser.make_config(Load, parsed)
    try:
        from minivllm_bench.client import Client, shown
    except ModuleNotFoundError as error:
        raise MinivllmError(f"{error.name} is missing: pip install 'minivllm[bench]'") from None
    client = Client(
        config.url,
        model=config.model,
        endpoint=config.endpoint,
        api_key=config.api_key or (None if "@" in config.url else os.environ.get("OPENAI_API_KEY")),
        temperature=config.temperature,
        timeout=config.timeout,
        extra_body=config.extra_fields(),
    )
    generator = LoadGenerator(client.ask, workload, load)
    failure: str | None = None
    code = 0
    try:
        asyncio.run(_run(client, generator, load))
    except MinivllmError as error:
        if not generator.records:
            raise
        failure, code = str(error), 1
    except KeyboardInterrupt:
        if not generator.records:
            raise
        failure, code = "interrupted", 130
    summary = summarise(generator.records, generator.seconds, config.goals)
    if failure is None and summary["failed"] == summary["requests"]:
        failure, code = f"{summary['failed']} requests were sent, and all failed", 1
    result = {
        "machine": machine.describe(),
        "command": _without_secrets(["minivllm", "bench", "serve", *argv]),
        "url": shown(client.base_url),
        "model": client.model,
        "endpoint": config.endpoint,
        "workload": config.workload,
        "load": asdict(load),
        "failure": failure,
        "generator_cpu_share": round(generator.cpu_share, 4),
        "summary": summary,
    }
    print(render(result))
    if config.output is not None:
        write_result(Path(config.output), result, generator.records)
    if failure is not None:
        print(f"minivllm bench serve: error: {failure}", file=sys.stderr)
    return code


async def _run(client: Client, generator: LoadGenerator, load: Load) -> None:
    async with client:
        await client.find_model()
        probe = Conversation(TextSource(-1), 0, Session(()))
        probe.ask(Turn(8, 2))
        await client.probe(probe)
        async with show_progress(generator.records, load):
            await generator.run()


def write_result(path: Path, result: dict[str, Any], records: Sequence[RequestRecord]) -> None:
    """``result`` with the requests, one a line. Raises MinivllmError where that can't be written."""
    lines = [json.dumps(record.as_json(), separators=(",", ":")) for record in records]
    head = json.dumps(result, indent=2).removesuffix("\n}")
    text = head + ',\n  "requests": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise MinivllmError(f"can't write {path}: {error.strerror}") from None


def _without_secrets(argv: Sequence[str]) -> list[str]:
    """The command as it may be shown: no API key, no password in a URL."""
    shown_argv, is_secret = [], False
    for part in argv:
        shown_argv.append("***" if is_secret else re.sub(r"^(--api-key=).*", r"\1***", part))
        is_secret = part == "--api-key"
    return [re.sub(r"(https?://)[^/]*@", r"\1", part) for part in shown_argv]
