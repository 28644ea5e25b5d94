"""Offline inference: the engine in this process, prompts in, finished outputs out."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from minivllm.completion import CompletionDelta, CompletionStream
from minivllm.config import EngineConfig
from minivllm.engine.startup import build_engine
from minivllm.errors import InvalidRequestError, RequestFailedError
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
        requests: dict[str, CompletionStream] = {}
        try:
            for ids, sampling, samples in zip(encoded, params, streams, strict=True):
                for index, stream in enumerate(samples):
                    request_id = next(self._request_ids)
                    self.engine.add(request_id, ids, sampling.for_sample(index))
                    requests[request_id] = stream
            with tqdm(total=len(requests), desc="answers", unit="answer", disable=not use_tqdm) as bar:
                for _ in self._run(requests):
                    bar.update()
        finally:
            for request_id in requests:
                self.engine.abort(request_id)  # nothing, unless this is left early
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
        prompts = [self.tokenizer.encode_chat(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams
    ) -> Generator[CompletionDelta, None, None]:
        """Complete one prompt, yielding its text as it grows. Leaving the iterator aborts the request."""
        ids = self._encode(prompt)
        check_request(ids, sampling_params, self.engine.info)
        stream = CompletionStream(self.tokenizer, ids, sampling_params)
        request_id = next(self._request_ids)
        self.engine.add(request_id, ids, sampling_params)
        try:
            while not stream.is_finished:
                for event in self.engine.step():
                    if event.request_id == request_id:
                        _raise_if_failed(event)
                        yield stream.push(event)
        finally:
            self.engine.abort(request_id)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _run(self, requests: dict[str, CompletionStream]) -> Iterator[CompletionStream]:
        """Step until all have ended; yields each as it ends."""
        while self.engine.has_work:
            for event in self.engine.step():
                stream = requests.get(event.request_id)
                if stream is None or stream.is_finished:
                    continue
                _raise_if_failed(event)
                stream.push(event)
                if stream.is_finished:
                    self.engine.abort(event.request_id)  # a stop string: the engine doesn't know yet
                    yield stream


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    is_single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if is_single else list(prompts)  # type: ignore[list-item, arg-type]


def _raise_if_failed(event: EngineEvent) -> None:
    if event.finish_reason is FinishReason.ERROR:
        raise RequestFailedError(f"the engine failed on this request: {event.error}")
