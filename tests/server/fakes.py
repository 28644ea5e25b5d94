"""A real HTTP server over an engine that needs no model: what it answers is written in the prompt."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPResponse

import httpx
import openai
import tokenizers
import uvicorn
from fastapi import FastAPI
from tokenizers import AddedToken
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from minivllm.config import ServerConfig
from minivllm.errors import DeadlineError, EngineDeadError, EngineRestartingError, RequestFailedError
from minivllm.request import (
    DEFAULT_TERMS,
    EngineEvent,
    EngineInfo,
    EngineStats,
    FinishReason,
    RequestMetrics,
    SamplingParams,
    Terms,
    TokenLogprob,
)
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.server.http11 import uvicorn_config
from minivllm.server.keys import ApiKeys
from minivllm.tokenizer.alphabet import BYTE_TO_CHAR
from minivllm.tokenizer.tokenizer import Tokenizer

MODEL = "org/fake-model"
MAX_MODEL_LEN = 256
MAX_BODY_SIZE = 100_000
BOS, EOS = "<|begin|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('this model has no tools') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ANSWER = "Ein schöner Tag 🦙!"


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE, *, adds_bos: bool = False) -> Tokenizer:
    """Token i is byte i: easy to count, and every character beyond ASCII is spread over several tokens.

    With ``adds_bos``, :data:`BOS` begins a text where special tokens are asked for.
    """
    backend = tokenizers.Tokenizer(BPE({BYTE_TO_CHAR[byte]: byte for byte in range(256)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    if adds_bos:
        backend.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    return Tokenizer(
        backend, special_tokens={"bos_token": BOS, "eos_token": EOS}, chat_template=chat_template
    )


class FakeEngine:
    """Answers :data:`ANSWER`, one byte a token; a word in the prompt makes it do something else.

    ``[hang]``: one token, then nothing. ``[fail]``: one token, then an error in the first sample; the
    others hang. ``[die]``: one token, then the engine is dead. ``[crash]``: an error that nobody foresaw.
    ``[late]``: one token, then its deadline has passed. ``[stop]``: one token, then the request is aborted
    from inside. With a seed, the answer starts with it; with ``ignore_eos``, with an end token. A zero byte
    in a prompt has no probability at all.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.info = EngineInfo(max_model_len=MAX_MODEL_LEN, vocab_size=tokenizer.vocab_size)
        self.is_alive = True
        self.is_hopeless = False
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.terms: dict[str, Terms] = {}
        self.started: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.closed: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Requests that were left before their end."""
        self._tokenizer = tokenizer

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        terms: Terms = DEFAULT_TERMS,
    ) -> AsyncGenerator[EngineEvent, None]:
        self.requests[request_id] = (prompt_token_ids, sampling)
        self.terms[request_id] = terms
        is_finished = False
        try:
            tokens = self._answer(sampling)
            prompt = self._tokenizer.decode(prompt_token_ids)
            yield EngineEvent(request_id, [])  # as of a long prompt, which takes several steps
            for place, token in enumerate(tokens):
                await asyncio.sleep(0)
                if place == 1:
                    self.started.put(request_id)
                    await self._misbehave(prompt, request_id)
                    if "[stop]" in prompt:
                        yield EngineEvent(request_id, [], finish_reason=FinishReason.ABORT)
                reason = None
                if place + 1 == sampling.max_tokens:
                    reason = FinishReason.LENGTH
                elif place + 1 == len(tokens):
                    reason = FinishReason.STOP
                is_finished = reason is not None
                event = EngineEvent(request_id, [token], _logprobs(place, token, sampling), reason)
                if place == 0 and sampling.prompt_logprobs is not None:
                    event.prompt_logprobs = [
                        TokenLogprob(
                            token,
                            -float(index) if token else float("-inf"),
                            [(7, -0.5), (0, float("-inf"))][: sampling.prompt_logprobs],
                            rank=index,
                        )
                        for index, token in enumerate(prompt_token_ids[1:], start=1)
                    ]
                if is_finished:
                    event.metrics = RequestMetrics(num_cached_tokens=len(prompt_token_ids) // 2)
                yield event
                if is_finished:
                    return
        finally:
            if not is_finished:
                self.closed.put(request_id)

    def check_alive(self) -> None:
        if not self.is_alive:
            raise EngineRestartingError("the engine is being restarted")

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=2,
            num_waiting=1,
            num_used_blocks=3,
            num_blocks=12,
            num_preemptions=0,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
        )

    def _answer(self, sampling: SamplingParams) -> list[int]:
        text = ANSWER if sampling.seed is None else f"{sampling.seed % 1000:03} {ANSWER}"
        end = self._tokenizer.encode(EOS)
        return [*(end if sampling.ignore_eos else []), *text.encode(), *end]

    async def _misbehave(self, prompt: str, request_id: str) -> None:
        if "[fail]" in prompt and request_id.endswith("-0"):
            raise RequestFailedError("the step raised")
        if "[hang]" in prompt or "[fail]" in prompt:
            await asyncio.Event().wait()
        if "[die]" in prompt:
            raise EngineDeadError("the engine process ended with code -9")
        if "[late]" in prompt:
            raise DeadlineError("the request wasn't finished in time")
        if "[crash]" in prompt:
            raise RuntimeError("secret details")


def _logprobs(place: int, token: int, sampling: SamplingParams) -> list[TokenLogprob] | None:
    """The sampled token is the second most likely; of the third nothing is left."""
    if sampling.logprobs is None:
        return None
    top = [(token + 1, -0.25), (token, -1.5 - place), (token + 2, float("-inf"))]
    return [TokenLogprob(token, -1.5 - place, top[: sampling.logprobs])]


class RunningServer:
    """An application behind uvicorn on a free port of this machine, in a thread."""

    def __init__(self, engine: FakeEngine, port: int) -> None:
        self.engine = engine
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=10)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=10)

    def close(self) -> None:
        self.http.close()
        self.openai.close()


@dataclass(frozen=True)
class RawAnswer:
    """What came back for bytes that no HTTP client would send."""

    status: int
    headers: Message
    body: bytes

    @property
    def error(self) -> dict[str, str | None]:
        """Inside the envelope."""
        assert self.headers["Content-Type"] == "application/json"
        envelope = json.loads(self.body)
        assert envelope.keys() == {"error"}
        return envelope["error"]


def send_raw(port: int, request: bytes, *, method: str = "GET") -> RawAnswer:
    """Send bytes, and read one answer, which is to a request of ``method``."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(request)
        with HTTPResponse(client, method=method) as answer:
            answer.begin()
            return RawAnswer(answer.status, answer.headers, answer.read())


def served(
    config: ServerConfig, api_keys: ApiKeys | None = None, tokenizer: Tokenizer | None = None
) -> AbstractContextManager[int]:
    """A server of its own with these settings; its port."""
    tokenizer = tokenizer or make_tokenizer()
    app = create_app(FakeEngine(tokenizer), tokenizer, config, MODEL, ServerState(), api_keys)
    return run_server(app, config)


@contextmanager
def run_server(app: FastAPI, config: ServerConfig | None = None) -> Iterator[int]:
    """Serve ``app`` on a free port, with the settings that ``minivllm serve`` gives uvicorn."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # as `serve` makes it
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn_config(app, config or ServerConfig(), timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
