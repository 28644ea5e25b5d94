"""OpenAI's routes. Completions and chat take one path:

build prompts → check them → run samples → word the answer, whole or as a stream.

They differ in the first step and in the wording (``formats.py``).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from minivllm.completion import CompletionDelta
from minivllm.errors import InvalidRequestError
from minivllm.request import CompletionOutput, FinishReason, SamplingParams
from minivllm.server.body import JsonRoute
from minivllm.server.chat import ChatTurn
from minivllm.server.context import ServerContext
from minivllm.server.formats import ChatFormat, Choice, CompletionFormat, Format
from minivllm.server.generation import Sample, make_samples, run_samples
from minivllm.server.grammar_check import GrammarChecker
from minivllm.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from minivllm.server.responses import ChatCompletion, Completion, Model, ModelList, StopReason, Usage
from minivllm.server.streaming import Emit, EventStream, run_until_disconnect

CLIENT_CLOSED_REQUEST = 499  # nginx's number: nobody is left to read it but the access log


def openai_router(context: ServerContext) -> APIRouter:
    """The routes under ``/v1``."""
    router = APIRouter(prefix="/v1", route_class=JsonRoute)
    tokenizer = context.tokenizer
    model: Model = {
        "id": context.model_name,
        "object": "model",
        "created": context.created,
        "owned_by": "minivllm",
        "max_model_len": context.engine.info.max_model_len,
    }

    @router.get("/models")
    async def list_models() -> ModelList:
        return {"object": "list", "data": [model]}

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> Model:
        context.check_model(name)
        return model

    @router.post("/completions", response_model=Completion)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        def prepare(sampling: SamplingParams) -> tuple[list[list[int]], SamplingParams]:
            return [
                tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts
            ], sampling

        async def check_grammar(grammars: GrammarChecker, grammar: str) -> None:
            await grammars.check(grammar, body.grammar_param)

        return await _generate(context, request, body, prepare, check_grammar, CompletionFormat(tokenizer))

    @router.post("/chat/completions", response_model=ChatCompletion)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        turn = ChatTurn(body, tokenizer, context.chat_style)
        return await _generate(
            context, request, body, turn.prepare, turn.check_grammar, ChatFormat(tokenizer, turn)
        )

    return router


async def _generate(
    context: ServerContext,
    request: Request,
    body: GenerationRequest,
    prepare: Callable[[SamplingParams], tuple[list[list[int]], SamplingParams]],
    check_grammar: Callable[[GrammarChecker, str], Awaitable[None]],
    wording: Format,
) -> Response:
    """Answer ``body``, for as long as the client is there.

    ``prepare`` makes the prompts' token ids, and what they ask of the sampling parameters beside;
    ``check_grammar`` raises where answers can't follow the one that the parameters have then.
    """
    context.check_ready()
    context.check_model(body.model)
    sampling = body.sampling_params()
    answer_id = wording.id_prefix + uuid.uuid4().hex

    def make() -> list[Sample]:
        prompts, prepared = prepare(sampling)
        return make_samples(answer_id, prompts, prepared, body.default_max_tokens, context.engine.info)

    try:
        # In a thread: a long prompt takes a while, and other clients' streams must not wait for it.
        samples = await asyncio.to_thread(make)
    except InvalidRequestError as error:
        error.param = body.given_name(error.param)
        raise
    grammar = samples[0].sampling.grammar
    if grammar is not None:
        await check_grammar(context.grammars, grammar)
    prompt_tokens = sum(len(sample.prompt_token_ids) for sample in samples[:: sampling.n])
    answer = _Answer(context, answer_id, wording, samples, prompt_tokens, body.include_usage)
    if body.stream:
        return EventStream(answer.stream)
    content = await run_until_disconnect(request.receive, answer.whole())
    return Response(status_code=CLIENT_CLOSED_REQUEST) if content is None else JSONResponse(content)


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer to one HTTP request, to be given whole or as a stream."""

    context: ServerContext
    id: str
    wording: Format
    samples: list[Sample]
    prompt_tokens: int
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, object]:
        """Run all samples, then word them."""
        outputs = await run_samples(self.context, self.samples, self.wording.shown_token_ids)
        choices = [
            self.wording.choice(o.index, o.text, o.logprobs, _stop_reason(o.finish_reason)) for o in outputs
        ]
        return self._envelope(self.wording.object_name, choices) | {"usage": self._usage(outputs)}

    async def stream(self, emit: Emit) -> None:
        """Run all samples, wording each piece as it comes."""

        async def emit_chunk(choices: list[Choice], usage: Usage | None = None) -> None:
            chunk = self._envelope(self.wording.chunk_object_name, choices)
            await emit(chunk | {"usage": usage} if self.include_usage else chunk)

        async def on_delta(index: int, delta: CompletionDelta) -> None:
            # No text yet: half a character, or what may become a stop string.
            if delta.text or delta.logprobs:
                choice = self.wording.chunk_choice(index, delta.text, delta.logprobs)
                if choice is not None:
                    await emit_chunk([choice])
            if delta.finish_reason is not None:
                for choice in self.wording.closing(index, _stop_reason(delta.finish_reason)):
                    await emit_chunk([choice])

        for sample in self.samples:
            opening = self.wording.opening(sample.index)
            if opening is not None:
                await emit_chunk([opening])
        outputs = await run_samples(self.context, self.samples, self.wording.shown_token_ids, on_delta)
        if self.include_usage:
            await emit_chunk([], self._usage(outputs))

    def _envelope(self, object_name: str, choices: list[Choice]) -> dict[str, object]:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.context.model_name,
            "choices": choices,
        }

    def _usage(self, outputs: list[CompletionOutput]) -> Usage:
        completion_tokens = sum(len(output.token_ids) for output in outputs)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }


def _stop_reason(reason: FinishReason | None) -> StopReason:
    """OpenAI's word for it. Requests that were aborted or failed have no answer to word."""
    return "length" if reason is FinishReason.LENGTH else "stop"
