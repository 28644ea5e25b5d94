"""Offline inference: the engine in this process, prompts in, finished outputs out."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from minivllm.completion import CompletionDelta, CompletionStream
from minivllm.config import EngineConfig
from minivllm.engine.startup import build_engine
from minivllm.errors import InvalidRequestError, RequestFailedError
from minivllm.interrupts import interrupts_wait
from minivllm.request import EngineEvent, FinishReason, RequestOutput, SamplingParams, check_request
from minivllm.tokenizer.load import load_tokenizer
from minivllm.weights.files import resolve_model

Prompt = str | Sequence[int]
"""Text, or token ids."""
Message = Mapping[str, Any]
"""``{"role": …, "content": …}``"""


class LLM:
    """A model and its engine, in this process.

    Args:
        model: as ``--model``: a folder, a ``.gguf`` file, a Hugging Face id, or None for the
            embedded model.
        options: any other field of :class:`EngineConfig`.

    Raises:
        StartupError: the model or the options can't be used; the message says why.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        config = EngineConfig(model=model, **options)
        files = resolve_model(config.model, revision=config.revision, load_format=config.load_format)
        self.tokenizer = load_tokenizer(files)
        self.engine = build_engine(config, files)
        self._request_ids = map(str, itertools.count())
        self._inboxes: dict[str, list[EngineEvent]] = {}
        """Where each unfinished request's events go: to its call. Several may be under way, in any thread."""
        self._left: deque[str] = deque()
        """Requests whose calls are over; they are aborted by whoever has the engine next."""
        self._lock = threading.Lock()
        """Of the engine."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete the prompts, batched as the scheduler sees fit. Outputs come in the prompts' order.

        Args:
            prompts: one prompt or several; a prompt is text or token ids.
            sampling_params: one for all, or one for each.

        Raises:
            InvalidRequestError: a prompt or parameter can't be served; nothing has run then.
            RequestFailedError: a step raised.
        """
        from tqdm import tqdm

        all_prompts = _as_list(prompts)
        encoded = [self._encode(prompt) for prompt in all_prompts]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(encoded)
        else:
            params = list(sampling_params)
        if len(params) != len(encoded):
            raise InvalidRequestError(
                f"sampling_params must be one, or one for each of {len(encoded)} prompts, got {len(params)}"
            )
        for prompt_token_ids, sampling in zip(encoded, params, strict=True):
            check_request(prompt_token_ids, sampling, self.engine.info)
        streams = [
            [CompletionStream(self.tokenizer, ids, sampling, index) for index in range(sampling.n)]
            for ids, sampling in zip(encoded, params, strict=True)
        ]
        unfinished: dict[str, CompletionStream] = {}
        inbox: list[EngineEvent] = []
        try:
            for ids, sampling, samples in zip(encoded, params, streams, strict=True):
                for index, stream in enumerate(samples):
                    unfinished[self._add(ids, sampling.for_sample(index), inbox)] = stream
            with tqdm(total=len(unfinished), desc="answers", unit="answer", disable=not use_tqdm) as bar:
                while unfinished:
                    for event in self._next_events(inbox):
                        if event.request_id not in unfinished:
                            continue
                        unfinished[event.request_id].push(event)
                        if unfinished[event.request_id].is_finished:
                            del unfinished[event.request_id]
                            self._end(event.request_id)
                            bar.update()
        finally:
            for request_id in unfinished:  # none, unless this is left early
                self._end(request_id)
        return [
            RequestOutput(
                prompt if isinstance(prompt, str) else None, ids, [stream.output for stream in samples]
            )
            for prompt, ids, samples in zip(all_prompts, encoded, streams, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template; see :meth:`generate`."""
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        limit = self.engine.info.max_model_len
        prompts = [self.tokenizer.encode_chat(each, max_tokens=limit) for each in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams
    ) -> Generator[CompletionDelta, None, None]:
        """Complete one prompt, yielding its text as it grows. Leaving the iterator aborts the request.

        Raises:
            InvalidRequestError: the prompt or a parameter can't be served, or ``n`` isn't 1.
            RequestFailedError: a step raised.
        """
        if sampling_params.n != 1:
            raise InvalidRequestError(f"n must be 1 for a stream, got {sampling_params.n}", param="n")
        ids = self._encode(prompt)
        check_request(ids, sampling_params, self.engine.info)
        stream = CompletionStream(self.tokenizer, ids, sampling_params)
        inbox: list[EngineEvent] = []
        request_id = self._add(ids, sampling_params, inbox)
        try:
            while not stream.is_finished:
                for event in self._next_events(inbox):
                    if not stream.is_finished:
                        yield stream.push(event)
        finally:
            self._end(request_id)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, max_tokens=self.engine.info.max_model_len)
        if not _is_list(prompt) or not all(isinstance(token_id, Integral) for token_id in prompt):
            raise InvalidRequestError(f"a prompt must be text or token ids, got {type(prompt).__name__}")
        return list(map(int, prompt))

    def _add(self, ids: list[int], sampling: SamplingParams, inbox: list[EngineEvent]) -> str:
        """Start a request whose events go to ``inbox``; returns its id."""
        request_id = next(self._request_ids)
        try:
            with self._engine_alone():
                self.engine.add(request_id, ids, sampling)
                self._inboxes[request_id] = inbox
        except BaseException:  # Ctrl-C waited until here
            self._end(request_id)
            raise
        return request_id

    def _end(self, request_id: str) -> None:
        """Forget a request, and abort it if the engine doesn't know yet that it has ended.

        Never waits: the garbage collector may close a forgotten stream in the middle of a step.
        """
        self._left.append(request_id)
        with interrupts_wait():
            if self._lock.acquire(blocking=False):
                try:
                    self._abort_left()
                finally:
                    self._lock.release()

    def _next_events(self, inbox: list[EngineEvent]) -> list[EngineEvent]:
        """Empty ``inbox``; if nothing is in there, take a step first, and give all calls what is theirs."""
        with self._engine_alone():
            if not inbox:
                for event in self.engine.step():
                    if event.request_id in self._inboxes:
                        self._inboxes[event.request_id].append(event)
            events = inbox.copy()
            inbox.clear()
        for event in events:
            if event.is_refusal:
                raise InvalidRequestError(f"the engine refused this request: {event.error}")
            if event.finish_reason is FinishReason.ERROR:
                raise RequestFailedError(f"the engine failed on this request: {event.error}")
        return events

    @contextmanager
    def _engine_alone(self) -> Iterator[None]:
        """The engine is this call's. Ctrl-C waits: a step cut in two leaves blocks that look computed."""
        with interrupts_wait(), self._lock:
            self._abort_left()
            yield
            self._abort_left()

    def _abort_left(self) -> None:
        while self._left:
            request_id = self._left.popleft()
            if self._inboxes.pop(request_id, None) is not None:
                self.engine.abort(request_id)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if not isinstance(prompts, str) and not _is_list(prompts):
        raise InvalidRequestError(f"prompts must be one or a list of them, got {type(prompts).__name__}")
    is_single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
    return [prompts] if is_single else list(prompts)  # type: ignore[list-item, arg-type]
