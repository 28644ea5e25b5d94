"""OpenAI's routes. Completions and chat take one path:

build prompts → check them → run samples → word the answer, whole or as a stream.

They differ in the first step and in the wording (``formats.py``); ``answer.py`` is the last step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from minivllm.errors import InvalidRequestError
from minivllm.request import SamplingParams, Terms
from minivllm.server.admission import Ticket
from minivllm.server.answer import Answer
from minivllm.server.body import JsonRoute
from minivllm.server.chat import ChatTurn
from minivllm.server.context import ServerContext
from minivllm.server.deadline import Deadline
from minivllm.server.formats import ChatFormat, CompletionFormat, Format
from minivllm.server.generation import Sample, make_samples
from minivllm.server.grammar_check import GrammarChecker
from minivllm.server.openapi import event_stream
from minivllm.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from minivllm.server.record import CLIENT_CLOSED_REQUEST, record_of
from minivllm.server.responses import ChatChunk, ChatCompletion, Completion, Model, ModelList
from minivllm.server.streaming import EventStream, run_until_disconnect


def openai_router(context: ServerContext, route_class: type[JsonRoute]) -> APIRouter:
    """The routes under ``/v1``."""
    router = APIRouter(prefix="/v1", route_class=route_class)
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

    @router.post("/completions", response_model=Completion, responses=event_stream(Completion))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        def prepare(sampling: SamplingParams, max_tokens: int) -> tuple[list[list[int]], SamplingParams]:
            with_special_tokens = body.add_special_tokens is not False
            return [
                tokenizer.encode(prompt, add_special_tokens=with_special_tokens, max_tokens=max_tokens)
                if isinstance(prompt, str)
                else prompt
                for prompt in body.prompts
            ], sampling

        async def check_grammar(grammars: GrammarChecker, grammar: str) -> None:
            await grammars.check(grammar, body.grammar_and_param[1])

        wording = CompletionFormat(tokenizer, skip_special_tokens=body.skip_special_tokens is not False)
        return await _generate(context, request, body, prepare, check_grammar, wording)

    @router.post("/chat/completions", response_model=ChatCompletion, responses=event_stream(ChatChunk))
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
    prepare: Callable[[SamplingParams, int], tuple[list[list[int]], SamplingParams]],
    check_grammar: Callable[[GrammarChecker, str], Awaitable[None]],
    wording: Format,
) -> Response:
    """Answer ``body``, for as long as the client is there.

    ``prepare`` makes the prompts' token ids, and what they ask of the sampling parameters beside;
    ``check_grammar`` raises where answers can't follow the one that the parameters have then.
    """
    record = record_of(request.scope)
    record.model = (body.model or context.model_name)[:200]
    record.is_streamed = bool(body.stream)
    context.check_ready()
    context.check_model(body.model)
    ticket: Ticket = request.state.ticket
    deadline = Deadline.of(body.timeout, request.headers)
    # Ours, never the client's X-Request-Id: the engine's ids must be unique.
    answer_id = record.answer_id = wording.id_prefix + request.state.unique_id
    given_id: str | None = request.state.given_id
    ticket.ids = frozenset((given_id or request.state.unique_id, answer_id))
    ticket.priority = body.priority

    def make() -> tuple[list[Sample], int]:
        prompts, sampling = prepare(body.sampling_params(), context.engine.info.max_model_len)
        if body.truncate_prompt_tokens is not None:
            prompts = [prompt[-body.truncate_prompt_tokens :] for prompt in prompts]
        record.prompt_lengths = [len(prompt) for prompt in prompts]
        record.num_samples = sampling.n
        if context.keeps_prompts:
            record.prompts = [
                context.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts
            ]
        return make_samples(context, answer_id, prompts, sampling, body.default_max_tokens), sampling.n

    async with deadline.holds():
        try:
            # In a thread: a long prompt or schema takes a while, and other clients' streams mustn't wait.
            samples, samples_per_prompt = await asyncio.to_thread(make)
        except InvalidRequestError as error:
            error.param = body.given_name(error.param)
            raise
        num_prompt_tokens = sum(len(sample.prompt_token_ids) for sample in samples[::samples_per_prompt])
        ticket.bring_prompts(num_prompt_tokens)
        ticket.check_deadline(deadline.seconds_left())
        if context.rate_limit is not None:
            num_tokens = num_prompt_tokens + sum(sample.sampling.max_tokens or 0 for sample in samples)
            ticket.num_taken_tokens = context.rate_limit.take(ticket.owner, num_tokens)
        grammar = samples[0].sampling.grammar
        if grammar is not None:
            await check_grammar(context.grammars, grammar)
    record.max_tokens = samples[0].sampling.max_tokens
    terms = Terms(body.priority, ticket.owner, deadline.seconds_left(), given_id)
    answer = Answer(context, body, answer_id, wording, samples, samples_per_prompt, record, ticket, terms)
    if body.stream:
        return EventStream(answer.stream)
    content = await run_until_disconnect(request.receive, answer.whole())
    return Response(status_code=CLIENT_CLOSED_REQUEST) if content is None else JSONResponse(content)
