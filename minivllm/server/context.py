"""What every route needs, gathered once: the engine, the tokenizer, the model's name, the state."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from minivllm.errors import ModelNotFoundError, ShuttingDownError
from minivllm.request import DEFAULT_TERMS, EngineEvent, EngineInfo, EngineStats, SamplingParams, Terms
from minivllm.server.admission import WaitingRoom
from minivllm.server.chat import ChatStyle
from minivllm.server.grammar_check import GrammarChecker
from minivllm.server.metrics import ServerMetrics
from minivllm.server.rate_limit import TokenRateLimit
from minivllm.tokenizer.tokenizer import Tokenizer


class Engine(Protocol):
    """What the server asks of an engine; ``minivllm.engine.supervisor.SupervisedEngine`` is one."""

    @property
    def info(self) -> EngineInfo:
        """What a request is checked against."""

    def check_alive(self) -> None:
        """Raise why no request can be served at this moment, if none can."""

    @property
    def is_hopeless(self) -> bool:
        """Whether it keeps failing, so that somebody should look."""

    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        terms: Terms = DEFAULT_TERMS,
    ) -> AsyncGenerator[EngineEvent, None]:
        """A request's events, the last with its finish reason; closing it early aborts the request."""

    @property
    def stats(self) -> EngineStats:
        """How busy the engine is."""


@dataclass(slots=True)
class ServerState:
    """What changes while the server runs; whoever handles signals writes it, the routes read it."""

    is_draining: bool = False
    """Running requests finish, new ones are refused with 503."""


@dataclass(frozen=True, slots=True)
class ServerContext:
    """One served model."""

    engine: Engine
    tokenizer: Tokenizer
    model_name: str
    """The name that clients ask for."""
    state: ServerState
    chat_style: ChatStyle
    """How the model writes tool calls and reasoning."""
    grammars: GrammarChecker
    metrics: ServerMetrics
    room: WaitingRoom
    rate_limit: TokenRateLimit | None
    max_tokens_per_request: int | None = None
    """Most tokens that all samples of one request may have together."""
    keeps_prompts: bool = False
    """Whether a request's record has its prompts."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds, for ``/v1/models``."""

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model. None stands for the one that is served."""
        if name is not None and name != self.model_name:
            raise ModelNotFoundError(
                f"the model {name[:200]!r} does not exist here; this server serves {self.model_name!r}",
                param="model",
            )

    def check_ready(self) -> None:
        """Raise what keeps the server from taking a new request, if anything does."""
        if self.state.is_draining:
            raise ShuttingDownError("the server is shutting down and takes no new requests")
        self.engine.check_alive()
