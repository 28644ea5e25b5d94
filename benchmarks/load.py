"""The contenders of ``peers.py``: HTTP servers, and libraries in child processes of their own.

Every contender takes the same work, ``run(prompts, max_tokens)``: all prompts at once, each
answered with exactly ``max_tokens`` tokens, greedily.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm_bench.servers import ContenderError, Process, start_server


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its token ids: contenders get the ids where they take them."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one run brought."""

    seconds: float
    """From the first prompt handed over to the last answer received."""
    prompt_tokens: list[int]
    """Of each prompt, as the contender counted them."""
    output_tokens: list[int]
    """Of each answer, as the contender counted them."""


class Contender(ABC):
    """Something that answers prompts. It stays up, idle, while the others are measured."""

    def __init__(self, version: str, command: Sequence[str]) -> None:
        self.version = version
        self.command = list(command)

    @abstractmethod
    def run(self, prompts: Sequence[Prompt], max_tokens: int) -> Answers:
        """Answer all prompts at once. Raises ContenderError."""

    @abstractmethod
    def close(self) -> None:
        """End its process, if it has one of its own."""


class HttpServer(Contender):
    """A server with ``/v1/completions``; each prompt has a connection of its own.

    Args:
        url: up to, and without, ``/v1``.
        version: for the results.
        extra: what goes into every request besides prompt, limit and temperature.
        send_text: give it text instead of token ids.
        process: the server's, if this has started it.
    """

    def __init__(
        self, url: str, version: str, extra: dict[str, Any], *, send_text: bool, process: Process | None
    ) -> None:
        super().__init__(version, process.command if process is not None else [url])
        self._url = url.rstrip("/")
        self._extra = extra
        self._send_text = send_text
        self._process = process

    def run(self, prompts: Sequence[Prompt], max_tokens: int) -> Answers:
        """Requests are worded before the clock starts, answers are parsed after it has stopped."""
        bodies = [
            json.dumps(
                {
                    "prompt": prompt.text if self._send_text else prompt.token_ids,
                    "max_tokens": max_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    **self._extra,
                }
            ).encode()
            for prompt in prompts
        ]
        try:
            seconds, contents = asyncio.run(_post_all(self._url, bodies))
            usages = [json.loads(content)["usage"] for content in contents]
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ContenderError(f"{type(error).__name__}: {error}") from error
        return Answers(
            seconds,
            [usage["prompt_tokens"] for usage in usages],
            [usage["completion_tokens"] for usage in usages],
        )

    def close(self) -> None:
        """Stop the server, if this has started it."""
        if self._process is not None:
            self._process.stop()


async def _post_all(url: str, bodies: list[bytes]) -> tuple[float, list[bytes]]:
    import httpx

    limits = httpx.Limits(max_connections=len(bodies), max_keepalive_connections=len(bodies))
    headers = {"Content-Type": "application/json"}
    try:
        async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:
            # Opens the connections, which the clock doesn't count.
            await asyncio.gather(*(client.get(f"{url}/v1/models") for _ in bodies))
            start = time.perf_counter()
            responses = await asyncio.gather(
                *(client.post(f"{url}/v1/completions", content=body, headers=headers) for body in bodies)
            )
            seconds = time.perf_counter() - start
    except httpx.HTTPError as error:
        raise ContenderError(f"{type(error).__name__}: {error}") from error
    for response in responses:
        if response.status_code != 200:
            raise ContenderError(f"HTTP {response.status_code}: {response.text[:300]}")
    return seconds, [response.content for response in responses]


def start_http_server(command: Sequence[str], version: str, extra: dict[str, Any]) -> HttpServer:
    """Start a server that takes token ids. Raises ContenderError."""
    server = start_server(command)
    return HttpServer(server.url, version, extra, send_text=False, process=server.process)


def connect(url: str) -> HttpServer:
    """A server that runs already and has OpenAI's routes. Raises ContenderError."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as response:
            model = json.load(response)["data"][0]["id"]
    except (OSError, ValueError, LookupError) as error:
        raise ContenderError(f"{url}: {error}") from error
    return HttpServer(url, f"unknown, serving {model}", {"model": model}, send_text=True, process=None)


class Library(Contender):
    """A Python library in a child process, which keeps the time itself.

    Args:
        kind: a key of ``LIBRARIES`` in ``libraries.py``.
        python: the interpreter that has the library.
        model: a GGUF file.
        cores: threads to run on.

    Raises:
        ContenderError: the library isn't there, or can't load the model.
    """

    def __init__(self, kind: str, python: str, model: Path, cores: int) -> None:
        command = [python, str(Path(__file__).with_name("libraries.py")), kind, str(model), str(cores)]
        self._process = Process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            hello = self._receive()
        except BaseException:  # also Ctrl-C and SIGTERM: nobody else knows of this process yet
            self._process.stop()
            raise
        super().__init__(hello["version"], command)

    def run(self, prompts: Sequence[Prompt], max_tokens: int) -> Answers:
        """Hand the prompts to the child, which starts the clock when it has them."""
        assert self._process.child.stdin is not None
        work = {"prompts": [prompt.token_ids for prompt in prompts], "max_tokens": max_tokens}
        try:
            print(json.dumps(work), file=self._process.child.stdin, flush=True)
        except OSError as error:
            raise ContenderError(f"its process has ended: {error}") from error
        answer = self._receive()
        return Answers(answer["seconds"], [len(prompt.token_ids) for prompt in prompts], answer["tokens"])

    def close(self) -> None:
        """End the child."""
        self._process.stop()

    def _receive(self) -> dict[str, Any]:
        assert self._process.child.stdout is not None
        line = self._process.child.stdout.readline()
        if not line:
            raise self._process.failed()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer
