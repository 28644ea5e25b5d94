"""The contenders of ``peers.py``: HTTP servers, and libraries in child processes of their own.

Every contender takes the same work, ``run(prompts, max_tokens)``: all prompts at once, each
answered with exactly ``max_tokens`` tokens, greedily. Run as a script, this file is such a child;
at its top it needs only the standard library, because a library's interpreter may have no more.

    python benchmarks/load.py KIND MODEL CORES
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

START_SECONDS = 600.0
"""A contender that isn't ready by then is left out."""


class ContenderError(Exception):
    """A contender that can't be started, or that didn't do what it was asked to."""


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


class Process:
    """A child process whose standard error is kept, for when it fails."""

    def __init__(self, command: Sequence[str], **pipes: Any) -> None:
        self.command = list(command)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.child = subprocess.Popen(self.command, stderr=self._log, **pipes)
        except OSError as error:
            raise ContenderError(f"can't be started: {error}") from error

    def failed(self) -> ContenderError:
        """Stop it; the error has the last lines that it wrote."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-3:]
        self.stop()
        return ContenderError("; ".join(["it ended or didn't get ready", *lines]))

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that doesn't help."""
        self.child.terminate()
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self._log.close()


def start_server(command: Sequence[str], version: str, extra: dict[str, Any]) -> HttpServer:
    """Start ``command --port PORT`` and wait until ``/health`` says 200. Raises ContenderError."""
    port = _free_port()
    process = Process([*command, "--port", str(port)], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_SECONDS
    try:
        while not _is_healthy(url):
            if process.child.poll() is not None or time.monotonic() > deadline:
                raise process.failed()
            time.sleep(0.2)
    except BaseException:  # also Ctrl-C and SIGTERM: nobody else knows of this process yet
        process.stop()
        raise
    return HttpServer(url, version, extra, send_text=False, process=process)


def connect(url: str) -> HttpServer:
    """A server that runs already and has OpenAI's routes. Raises ContenderError."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as response:
            model = json.load(response)["data"][0]["id"]
    except (OSError, ValueError, LookupError) as error:
        raise ContenderError(f"{url}: {error}") from error
    return HttpServer(url, f"unknown, serving {model}", {"model": model}, send_text=True, process=None)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:  # refused, or 503 while it loads
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Library(Contender):
    """A Python library in a child process, which keeps the time itself.

    Args:
        kind: a key of :data:`LIBRARIES`.
        python: the interpreter that has the library.
        model: a GGUF file.
        cores: threads to run on.

    Raises:
        ContenderError: the library isn't there, or can't load the model.
    """

    def __init__(self, kind: str, python: str, model: Path, cores: int) -> None:
        command = [python, __file__, kind, str(model), str(cores)]
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


# What follows runs in the child.

Run = Callable[[list[list[int]], int], list[int]]
"""Answers prompts (token ids) with so many tokens each, and returns how many there really were."""


def _openvino_genai(model: str, cores: int) -> tuple[str, Run]:
    import numpy
    import openvino  # type: ignore[import-not-found, unused-ignore]
    import openvino_genai  # type: ignore[import-not-found, unused-ignore]

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": cores}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def run(prompts: list[list[int]], max_tokens: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        tensors = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [config] * len(prompts))
        return [len(result.m_generation_ids[0]) for result in results]

    return f"openvino-genai {openvino_genai.__version__}, continuous batching", run


def _llama_cpp_python(model: str, cores: int) -> tuple[str, Run]:
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    llama = llama_cpp.Llama(model, n_ctx=4096, n_threads=cores, n_threads_batch=cores, verbose=False)

    def run(prompts: list[list[int]], max_tokens: int) -> list[int]:
        counts = []
        for prompt in prompts:
            tokens = llama.generate(prompt, temp=0.0)
            counts.append(sum(1 for _ in zip(range(max_tokens), tokens, strict=False)))
            llama.reset()
        return counts

    return f"llama-cpp-python {llama_cpp.__version__}, one prompt after the other", run


def _transformers(model: str, cores: int) -> tuple[str, Run]:
    import torch
    import transformers

    torch.set_num_threads(cores)
    transformers.utils.logging.set_verbosity_error()
    folder, name = os.path.split(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    loaded.generation_config.eos_token_id = None  # otherwise an answer may end early

    def run(prompts: list[list[int]], max_tokens: int) -> list[int]:
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = loaded.generate(
            padded, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        return [output.shape[1] - longest] * len(prompts)

    return f"transformers {transformers.__version__}, torch {torch.__version__}, float32, padded batch", run


LIBRARIES: dict[str, Callable[[str, int], tuple[str, Run]]] = {
    "openvino-genai": _openvino_genai,
    "llama-cpp-python": _llama_cpp_python,
    "transformers": _transformers,
}
"""What a child can be: loads a model, and returns the library's version and how to run it."""


def main(kind: str, model: str, cores: str) -> None:
    """Answer lines of work on standard input with lines of JSON, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        version, run = LIBRARIES[kind](model, int(cores))
    except ImportError as error:
        answer(error=f"not installed in {sys.executable}: {error}")
        return
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(version=version)
    for line in sys.stdin:
        work = json.loads(line)
        start = time.perf_counter()
        try:
            tokens = run(work["prompts"], work["max_tokens"])
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
        else:
            answer(seconds=time.perf_counter() - start, tokens=tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
