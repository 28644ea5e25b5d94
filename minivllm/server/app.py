"""The web application: OpenAI's routes, and a few of our own around them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp

import minivllm
from minivllm.config import ServerConfig
from minivllm.errors import ContextLengthError, InvalidRequestError, MinivllmError, RequestNotFoundError
from minivllm.server.admission import WaitingRoom
from minivllm.server.body import JsonRoute
from minivllm.server.chat import ChatStyle
from minivllm.server.context import Engine, ServerContext, ServerState
from minivllm.server.debug import RecentSteps, debug_router
from minivllm.server.door import guard
from minivllm.server.errors import add_error_handlers
from minivllm.server.grammar_check import GrammarChecker
from minivllm.server.keys import ApiKeys
from minivllm.server.lenient import LenientRoute
from minivllm.server.metrics import ServerMetrics
from minivllm.server.openai import openai_router
from minivllm.server.protocol import DetokenizeRequest, TokenizeRequest
from minivllm.server.rate_limit import TokenRateLimit
from minivllm.server.record import OnRequestEnd
from minivllm.server.responses import Detokenized, ErrorEnvelope, Health, QueuePosition, Tokenized, Version
from minivllm.tokenizer.tokenizer import Tokenizer


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    server_config: ServerConfig,
    model_name: str,
    state: ServerState,
    api_keys: ApiKeys | None = None,
    grammars: GrammarChecker | None = None,
    metrics: ServerMetrics | None = None,
    room: WaitingRoom | None = None,
    on_request_end: Sequence[OnRequestEnd] = (),
    recent_steps: RecentSteps | None = None,
) -> FastAPI:
    """The application that serves one model.

    Args:
        engine: started, and stopped by the caller.
        tokenizer: the model's.
        server_config: its limits, what it says of CORS, and how answers are parsed; no keys and no files
            are read here.
        model_name: what clients ask for.
        state: the caller's handle on the running application.
        api_keys: one of them is needed for every path but ``/health``, ``/ping`` and ``/ready``; None: nobody
            needs one.
        grammars: closed by the caller. None: one of its own, whose process ends with this one.
        metrics: told of the engine's steps by the caller. None: some of its own, that nobody tells.
        room: where the caller sees who is being answered. None: one of its own.
        recent_steps: told of the engine's steps by the caller, for the routes under ``/debug``. None: there
            are no such routes.
        on_request_end: who else is told, with the metrics, what became of each HTTP request.
    """
    metrics = metrics or ServerMetrics(server_config.metrics_prefix, model_name, engine.info, engine.stats)
    room = room or WaitingRoom.of(server_config)
    rate = server_config.key_tokens_per_minute
    rate_limit = None if rate is None else TokenRateLimit(rate)
    context = ServerContext(
        engine,
        tokenizer,
        model_name,
        state,
        ChatStyle.of(tokenizer, server_config),
        grammars or GrammarChecker(tokenizer, engine.info.vocab_size),
        metrics,
        room,
        rate_limit,
        keeps_prompts=server_config.log_prompts,
        max_tokens_per_request=server_config.max_tokens_per_request,
    )
    on_request_end = [metrics.request_done, *on_request_end]
    app = _GuardedApp(
        lambda app: guard(app, server_config, api_keys, room, rate_limit, on_request_end),
        title="minivllm",
        version=minivllm.__version__,
        docs_url=None,  # a page that would load its scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorEnvelope}, "5XX": {"model": ErrorEnvelope}},
    )
    add_error_handlers(app)
    route_class = LenientRoute if server_config.ignore_unknown_fields else JsonRoute
    app.include_router(openai_router(context, route_class))
    app.include_router(_own_router(context, route_class))
    if recent_steps is not None:
        app.include_router(debug_router(recent_steps))
    return app


class _GuardedApp(FastAPI):
    """FastAPI with its door outside of everything, its answers to unforeseen errors included.

    ``add_middleware`` would put it inside of those, and they would leave without CORS headers and request id.
    """

    def __init__(self, guard: Callable[[ASGIApp], ASGIApp], **settings: Any) -> None:
        super().__init__(**settings)
        self._guard = guard

    def build_middleware_stack(self) -> ASGIApp:
        """Called once, by Starlette, before the first request."""
        return self._guard(super().build_middleware_stack())


def _own_router(context: ServerContext, route_class: type[JsonRoute]) -> APIRouter:
    """The routes that OpenAI doesn't have; names and shapes are vLLM's where it has them."""
    router = APIRouter(route_class=route_class)
    tokenizer = context.tokenizer

    @router.get("/health", response_model=Health)
    @router.get("/ping", response_model=Health)  # the name that some load balancers insist on
    async def health() -> Response:
        """Whether this process lives; 503 when its engine keeps failing, so that it should be replaced."""
        status = _status(context)
        is_well = status in ("ok", "draining") or not context.engine.is_hopeless
        return JSONResponse(_health(context, status), status_code=200 if is_well else 503)

    @router.get("/ready", response_model=Health)
    async def ready() -> Response:
        """Whether a request sent now would be served; 503 tells load balancers to send none."""
        status = _status(context)
        return JSONResponse(_health(context, status), status_code=200 if status == "ok" else 503)

    @router.get("/v1/queue/{request_id:path}")  # an X-Request-Id may have slashes
    async def queue_position(request_id: str, request: Request) -> QueuePosition:
        """Where one of the caller's own requests stands, by its X-Request-Id or the id of its answer."""
        ticket = context.room.find(request_id, getattr(request.state, "key_name", ""))
        if ticket is None:
            raise RequestNotFoundError(f"no request {request_id[:200]!r} is being answered")
        waiting = context.room.waiting()
        position = waiting.index(ticket) + 1 if ticket.is_waiting else 0
        return {
            "id": request_id,
            "status": "waiting" if ticket.is_waiting else "running",
            "position": position,
            "num_waiting": len(waiting),
            "estimated_start_seconds": context.room.seconds_until_start(position),
        }

    # Not in /openapi.json: a client of the API has no use for it, and its format isn't JSON.
    @router.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        content, media_type = context.metrics.expose(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": media_type})

    @router.get("/version")
    async def version() -> Version:
        return {"version": minivllm.__version__}

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        context.check_model(body.model)
        limit = context.engine.info.max_model_len

        def encode() -> list[int]:
            if body.messages is not None:
                messages = [message.for_template() for message in body.messages]
                return tokenizer.encode_chat(
                    messages, add_special_tokens=bool(body.add_special_tokens), max_tokens=limit
                )
            return tokenizer.encode(
                body.prompt or "",
                add_special_tokens=body.add_special_tokens is not False,
                max_tokens=limit,
            )

        try:
            tokens = await asyncio.to_thread(encode)
        except ContextLengthError as error:
            error.param = "prompt" if body.messages is None else "messages"
            raise
        return {"tokens": tokens, "count": len(tokens), "max_model_len": limit}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        context.check_model(body.model)

        def decode() -> str:
            vocab_size = context.engine.info.vocab_size
            for token_id in body.tokens:
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequestError(
                        f"token ids must be from 0 to {vocab_size - 1}, got {token_id}", param="tokens"
                    )
            return tokenizer.decode(body.tokens, skip_special_tokens=False)

        return {"prompt": await asyncio.to_thread(decode)}

    return router


def _status(context: ServerContext) -> Literal["ok", "draining", "restarting"]:
    if context.state.is_draining:
        return "draining"
    try:
        context.engine.check_alive()
    except MinivllmError:
        return "restarting"
    return "ok"


def _health(context: ServerContext, status: Literal["ok", "draining", "restarting"]) -> Health:
    stats = context.engine.stats
    return {
        "status": status,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "kv_cache_usage": stats.kv_cache_usage,
    }
