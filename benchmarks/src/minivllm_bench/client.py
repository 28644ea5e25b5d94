"""One streamed request to a server with OpenAI's routes, with the times of all that comes back."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import msgspec

from minivllm.errors import ConfigError, MinivllmError
from minivllm_bench.generator import Clock
from minivllm_bench.prompts import Conversation
from minivllm_bench.records import RequestRecord
from minivllm_bench.sse import EventParser


class UnreachableError(MinivllmError):
    """No connection to the server can be made, or it doesn't answer as it should."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class Client:
    """Sends requests to one server. An asynchronous context manager: connections close at its end.

    Args:
        url: of the server, with or without ``/v1``.
        model: as the server calls it; None: the first that it lists.
        endpoint: ``completions`` or ``chat``.
        api_key: sent as a bearer token.
        temperature: 0 is greedy.
        timeout: seconds that one request may take in all; None: as long as it takes.
        extra_body: more fields of each request; a null takes one out.
        connector: how to connect; None: TCP, as many connections as there are requests.

    Raises:
        ConfigError: the URL is not one, or has a user where there is an API key.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        endpoint: str = "completions",
        api_key: str | None = None,
        temperature: float = 0.0,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
        connector: aiohttp.BaseConnector | None = None,
    ) -> None:
        self.base_url = _base_url(url)
        self.model = model
        self._is_chat = endpoint == "chat"
        self._route = f"{self.base_url}/{'chat/completions' if self._is_chat else 'completions'}"
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            if urlsplit(url).username is not None:
                raise ConfigError("give either an API key or a user in the URL: both go into the same header")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._temperature = temperature
        self._timeout = timeout
        self._extra_body = dict(extra_body or {})
        self._connector = connector

    async def __aenter__(self) -> Client:
        # A server closes idle connections at some time; this is before any of them does.
        connector = self._connector or aiohttp.TCPConnector(limit=0, keepalive_timeout=1)
        self._http = aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def find_model(self) -> str:
        """The model that the requests name: the first of ``/v1/models`` where none was given.

        Raises:
            UnreachableError: the server can't be reached, refuses, or lists none.
        """
        if self.model is None:
            url = f"{self.base_url}/models"
            try:
                async with self._http.get(url) as response:
                    content = await response.read()
                    if response.status != 200:
                        raise UnreachableError(f"{shown(url)}: {_refusal(response.status, content)}")
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                raise UnreachableError(f"{shown(url)}: {self._failure(error)}") from None
            try:
                self.model = str(json.loads(content)["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise UnreachableError(f"{shown(url)} lists no model: name one with --model") from None
        return self.model

    async def probe(self, conversation: Conversation) -> None:
        """Send one request of two tokens. Raises UnreachableError where it isn't answered in full."""
        loop = asyncio.get_running_loop()
        record = RequestRecord(0, 0, loop.time(), conversation.prompt_tokens)
        await self.ask(conversation, 2, record, loop.time)
        if record.error is not None:
            is_refused = record.status in (400, 422)
            hint = "; --extra-body '{\"FIELD\": null}' leaves out a field that the server doesn't take"
            raise UnreachableError(f"{shown(self._route)}: {record.error}{hint if is_refused else ''}")

    async def ask(
        self, conversation: Conversation, num_tokens: int, record: RequestRecord, clock: Clock
    ) -> str:
        """Send a conversation, and write what happens into ``record``. Returns the answer's text.

        Raises:
            UnreachableError: no connection can be made. The record has it, too.
        """
        answer = _Answer(record)
        try:
            async with self._http.post(self._route, data=self._body(conversation, num_tokens)) as response:
                record.status = response.status
                if response.status != 200:
                    record.error = _refusal(response.status, await response.read())
                else:
                    try:
                        await answer.read(response, clock)
                    finally:  # also of one that is broken off
                        answer.count()
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as error:
            record.error = self._failure(error)
            raise UnreachableError(f"{shown(self._route)}: {record.error}") from None
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if record.finished is None:  # what happens after the end doesn't matter
                record.error = self._failure(error)
        if record.finished is None:
            record.finished = clock()
        return answer.text

    def _body(self, conversation: Conversation, num_tokens: int) -> bytes:
        if self._is_chat:
            what: dict[str, Any] = {"messages": conversation.messages}
        else:
            what = {"prompt": conversation.prompt}
        body = {
            "model": self.model,
            **what,
            "max_tokens": num_tokens,
            "temperature": self._temperature,
            "ignore_eos": True,  # vLLM's field, which others know or pass over
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra_body,
        }
        return msgspec.json.encode({name: value for name, value in body.items() if value is not None})

    def _failure(self, error: BaseException) -> str:
        """One line about what went wrong on the way."""
        if isinstance(error, TimeoutError):
            return f"no complete answer within {self._timeout:g} s"
        if isinstance(error, aiohttp.ClientConnectorError):
            reason = error.os_error  # asyncio words some of them itself, with the address once more
            number = reason.errno or 0
            return f"can't connect: {os.strerror(number) if number > 0 else reason.strerror or reason}"
        return _one_line(f"the connection was lost: {error or type(error).__name__}")


class _Answer:
    """What a streamed answer brings, written into its record."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._parts: list[str] = []
        self._is_ended = False
        self._usage: _Usage | None = None

    @property
    def text(self) -> str:
        return "".join(self._parts)

    async def read(self, response: aiohttp.ClientResponse, clock: Clock) -> None:
        """Until the stream's end."""
        record, parser, receive = self._record, EventParser(), response.content.readany
        while record.error is None:
            received = await receive()
            now = clock()
            events = parser.feed(received) if received else parser.finish()
            for event in events:
                self._take(event, now)
            if not received:
                break
        if record.error is None and not self._is_ended:
            kind = response.content_type
            record.error = (
                "the stream ended before the answer was complete"
                if kind == "text/event-stream"
                else f"no stream of events came back but {kind}"
            )

    def count(self) -> None:
        """Tokens, as the server has counted them as far as it has come."""
        record = self._record
        if self._usage is not None:
            record.prompt_tokens = self._usage.prompt_tokens or record.prompt_tokens
            details = self._usage.prompt_tokens_details
            record.cached_tokens = (details and details.cached_tokens) or 0
        counted = self._usage.completion_tokens if self._usage is not None else None
        record.output_tokens = len(record.chunk_times) if counted is None else counted

    def _take(self, event: bytes, now: float) -> None:
        record = self._record
        if record.finished is not None or record.error is not None:
            return
        if event == b"[DONE]":
            self._is_ended = True
            record.finished = now
            return
        try:
            chunk = _decode_chunk(event)
        except msgspec.MsgspecError:
            record.error = _one_line(f"not an event of OpenAI's: {event[:100].decode(errors='replace')}")
            return
        if chunk.error is not None:
            record.error = _message({"error": chunk.error})
            return
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices or ():
            text, thought = choice.text, None
            if choice.delta is not None:
                text = choice.delta.content
                thought = choice.delta.reasoning_content or choice.delta.reasoning
            if text:
                self._parts.append(text)
            if text or thought:
                record.chunk_times.append(now)
            if choice.finish_reason is not None:
                self._is_ended = True


def shown(url: str) -> str:
    """A URL without the user and password that may be in it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port
        is_one = False
    if not is_one:
        raise ConfigError(f"a server's URL looks like http://127.0.0.1:8000, got {url!r}")
    path = parts.path.rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path if path.endswith("/v1") else f"{path}/v1", "", ""))


def _refusal(status: int, content: bytes) -> str:
    try:
        text = _message(json.loads(content))
    except ValueError:
        text = content[:200].decode(errors="replace")
    return _one_line(f"HTTP {status}: {text}" if text.strip() else f"HTTP {status}")


def _message(body: Any) -> str:
    """The message in an error's body, wherever this server puts it."""
    while isinstance(body, dict):
        body = next((body[name] for name in ("error", "message", "detail") if body.get(name)), str(body))
    return _one_line(str(body))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}…"
