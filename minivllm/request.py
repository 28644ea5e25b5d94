"""The nouns: what a request asks for, what it is while it runs, and what comes out of it.

Only plain data lives here. The scheduler moves a :class:`Request` between its queues, the block
manager writes its ``block_table``, and nobody else keeps per-request state.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from minivllm.errors import ContextLengthError, InvalidRequestError

if TYPE_CHECKING:
    from minivllm.engine.grammar import GrammarState

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_N = 128
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_CHARS = 256 * 1024

PENDING_TOKEN = -1
"""Stands in a sequence for a token whose step still runs on the device."""


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-turn token, a stop token id or a stop string
    LENGTH = "length"  # max_tokens reached, or the context is full
    ABORT = "abort"  # the client went away, or called abort
    ERROR = "error"  # the step that computed it raised
    TIMEOUT = "timeout"  # its own deadline passed


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose a request's tokens. Values are checked here, once, and never again.

    Raises :class:`InvalidRequestError` (a ``ValueError``) that names the limit and the given value.
    """

    n: int = 1
    """Completions per prompt, each with its own random stream."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: as many as the context still holds."""
    min_tokens: int = 0
    """End-of-turn tokens, stop ids and stop strings have no effect before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this. 1 is off."""
    top_k: int = 0
    """Keep this many most likely tokens. 0 (or -1) is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one. 0 is off."""
    repetition_penalty: float = 1.0
    """Divide (if positive) or multiply the logits of tokens in prompt and output. 1 is off."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens that are in the output."""
    frequency_penalty: float = 0.0
    """Subtract from logits once for each time that the token is in the output."""
    seed: int | None = None
    """The same seed, prompt and parameters give the same tokens, whatever else runs."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, besides the model's own end-of-turn ids."""
    ignore_eos: bool = False
    """Go on past the model's end-of-turn ids."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """By token id, from -100 to 100: added to the logits before anything else."""
    logprobs: int | None = None
    """None: no log probabilities. k: that of the sampled token and of the k most likely ones."""
    prompt_logprobs: int | None = None
    """Log probabilities of the prompt's tokens, from the second on; each token's own, and those of so
    many of the most likely ones. The prompt isn't taken from the prefix cache."""
    include_stop_str_in_output: bool = False
    """Whether the stop string that ended the answer is part of it."""
    skip_special_tokens: bool = True
    """Whether special tokens show no text."""
    grammar: str | None = None
    """What the answer must be: a grammar in llguidance's Lark. ``minivllm.structured`` makes one from a
    JSON schema, a regular expression or a list of choices. End-of-turn tokens come where the grammar is
    satisfied, and end the answer where it can't go on, whatever ``ignore_eos`` and ``min_tokens`` say."""

    def __post_init__(self) -> None:
        # A JSON array arrives as a list, which could be changed.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_int("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            self._check_int("max_tokens", self.max_tokens, 1, None)
        self._check_int("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            self._refuse("min_tokens", f"at most {self.max_tokens} (max_tokens)", self.min_tokens)
        self._check_float("temperature", self.temperature, 0.0, 100.0)
        self._check_float("top_p", self.top_p, 0.0, 1.0, exclusive_low=True)
        self._check_int("top_k", self.top_k, -1, None)
        self._check_float("min_p", self.min_p, 0.0, 1.0)
        self._check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, exclusive_low=True)
        self._check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            self._check_int("seed", self.seed, -(2**63), 2**63 - 1)
        for param in ("logprobs", "prompt_logprobs"):
            if getattr(self, param) is not None:
                self._check_int(param, getattr(self, param), 0, MAX_LOGPROBS)
        if self.grammar is not None:
            if not isinstance(self.grammar, str) or not self.grammar.strip():
                self._refuse("grammar", "a grammar's text", repr(self.grammar)[:80])
            if len(self.grammar) > MAX_GRAMMAR_CHARS:
                self._refuse("grammar", f"at most {MAX_GRAMMAR_CHARS} characters long", len(self.grammar))
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            self._refuse("logit_bias", f"at most {MAX_LOGIT_BIAS} tokens", len(self.logit_bias))
        for token_id, bias in self.logit_bias.items():
            self._check_int("logit_bias", token_id, 0, None)
            self._check_float("logit_bias", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS:
            self._refuse("stop", f"at most {MAX_STOP_STRINGS} stop strings", len(self.stop))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                self._refuse("stop", "non-empty strings", repr(text))
        for token_id in self.stop_token_ids:
            self._check_int("stop_token_ids", token_id, 0, None)

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that occurred are less (or more) likely for it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @cached_property
    def adjusts_logits(self) -> bool:
        """Whether biases, penalties or ``min_tokens`` change the model's logits. Asked in every step."""
        return bool(self.logit_bias) or self.has_penalties or self.min_tokens > 0

    @cached_property
    def reads_output(self) -> bool:
        """Whether penalties or a grammar need each token on the host before the next one is chosen.

        Such a step doesn't run ahead. Asked in every step.
        """
        return self.has_penalties or self.grammar is not None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, always."""
        return self.temperature == 0.0

    def for_sample(self, index: int, max_tokens: int | None = None) -> SamplingParams:
        """The parameters of one of the ``n`` completions: samples differ, and repeat when the seed does.

        The seed is hashed, not added: the samples of seed 1 must not turn up among those of seed 2.
        ``max_tokens`` takes the place of its own, if it is given.
        """
        seed = self.seed
        if seed is not None and index > 0:
            digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
            seed = int.from_bytes(digest[:8], "big", signed=True)
        return replace(self, n=1, seed=seed, max_tokens=max_tokens or self.max_tokens)

    @staticmethod
    def _refuse(param: str, limit: str, given: Any) -> None:
        raise InvalidRequestError(f"{param} must be {limit}, got {given}", param=param)

    def _check_int(self, param: str, value: Any, low: int | None, high: int | None) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            self._refuse(param, "an integer", repr(value))
        self._check_range(param, value, low, high)

    def _check_float(
        self, param: str, value: Any, low: float, high: float, *, exclusive_low: bool = False
    ) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            self._refuse(param, "a finite number", repr(value))
        if exclusive_low and value == low:
            self._refuse(param, f"greater than {low:g}", value)
        self._check_range(param, value, low, high)

    def _check_range(self, param: str, value: float, low: float | None, high: float | None) -> None:
        if low is not None and value < low:
            self._refuse(param, f"at least {low}", value)
        if high is not None and value > high:
            self._refuse(param, f"at most {high}", value)


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request is scheduled, whatever it asks for."""

    priority: int = 0
    """The lower, the sooner it is admitted."""
    tenant: str = ""
    """Whose it is, where tenants share an engine fairly."""
    timeout: float | None = None
    """Seconds from now after which nobody wants its answer any more."""
    client_id: str | None = None
    """What its client calls it, where it has a name of its own for it: for traces alone."""


DEFAULT_TERMS = Terms()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One sampled token's log probability under the model, before temperature and penalties."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, log probability) of the most likely tokens, best first; as many as asked for."""
    rank: int | None = None
    """Of a prompt's token: 1 for the most likely one."""


@dataclass(slots=True)
class RequestMetrics:
    """A finished request's history. Times are seconds of the engine's clock; 0 means never."""

    arrival_time: float = 0.0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request was first admitted."""
    num_preemptions: int = 0
    """How often it was evicted and computed again."""


@dataclass(eq=False, slots=True)
class Request:
    """One sequence inside the engine: its tokens, and how far the KV cache has got with them.

    ``num_computed_tokens`` tokens have their keys and values in the cache. The rest of
    ``token_ids`` still has to go through the model: the whole prompt at first, one token in each
    decode, everything again after a preemption.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int
    """Of this request's random stream: ``sampling.seed``, or drawn by the engine."""
    max_total_tokens: int
    """Prompt and output together end here."""
    terms: Terms = DEFAULT_TERMS
    end_token_ids: frozenset[int] = frozenset()
    """Any of these ends it, once it has more than ``min_tokens``. Set by the scheduler."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    token_ids: list[int] = field(default_factory=list)
    """Prompt, then output; at the end :data:`PENDING_TOKEN` where the next one is still being computed."""
    num_computed_tokens: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))
    """Block ids, in order, as int32. Written by the block manager alone."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the full blocks of ``token_ids``, as far as they were needed."""
    num_shareable_blocks: int = 0
    """Blocks at the start of the table that the prefix cache knows. Written by the block manager alone."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Where asked for: of the prompt's second token and those after it, as far as they are computed."""
    grammar: GrammarState | None = None
    """Where the output stands in ``sampling.grammar``. Written by ``engine/grammar.py`` alone."""
    is_finished: bool = False
    """Whether its last event is out."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def has_all_tokens(self) -> bool:
        """Whether the sequence is as long as it may get, its last token known or pending."""
        return len(self.token_ids) >= self.max_total_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that are known but not in the KV cache yet; 1 in steady decode."""
        return len(self.token_ids) - self.num_computed_tokens


@dataclass(slots=True)  # not frozen: each decode makes one, and a frozen one takes three times as long
class EngineEvent:
    """What one step brought one request. The last one carries ``finish_reason``."""

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    """One for each new token, where the request asked for them."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    metrics: RequestMetrics | None = None
    """In a request's last event; so far as they are known, in that of its first token, too."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """With its first token, where it asked for them: one for each token of its prompt but the first."""
    is_refusal: bool = False
    """Whether the ``error`` is what it asked for, such as a grammar that takes too long."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` completions of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprob] | None
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprob] | None = None
    """Where asked for: one for each token of the prompt but the first."""


@dataclass(slots=True)
class RequestOutput:
    """What :class:`minivllm.LLM` returns for one prompt."""

    prompt: str | None
    """None where the prompt was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the edge (server, LLM, chat) must know of a running engine to check a request."""

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A running engine at one moment."""

    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_preemptions: int
    """Since start-up."""
    prefix_cache_queries: int
    """Tokens looked up in the prefix cache since start-up."""
    prefix_cache_hits: int
    """Those that were found there."""
    num_step_tokens: int = 0
    """Tokens that went through the model since start-up: those of prompts, of decodes, and what was computed
    again after a preemption."""
    num_compiling: int = 0
    """Of ``num_waiting``, those whose grammars are being compiled."""
    waits_for: str | None = None
    """What the first of the others waited for in the last step, and those behind it with it: as
    ``ScheduledBatch.waits_for``."""

    @classmethod
    def of_nothing(cls) -> EngineStats:
        """Of an engine that doesn't run."""
        return cls(0, 0, 0, 0, 0, 0, 0)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV blocks that live sequences hold."""
        return self.num_used_blocks / max(self.num_blocks, 1)


def check_request(prompt_token_ids: list[int], sampling: SamplingParams, info: EngineInfo) -> None:
    """Refuse what can never be served: called once, at the edge, before a request enters the engine.

    Raises:
        ContextLengthError: prompt, or prompt and ``max_tokens``, over ``info.max_model_len``.
        InvalidRequestError: an empty prompt, or token ids outside the vocabulary.
    """
    if not prompt_token_ids:
        raise InvalidRequestError("the prompt must have at least 1 token, got 0", param="prompt")
    for token_id in prompt_token_ids:
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(
                f"token ids must be from 0 to {info.vocab_size - 1}, got {token_id}", param="prompt"
            )
    for param, named_ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
    ):
        for token_id in named_ids:
            if token_id >= info.vocab_size:
                raise InvalidRequestError(
                    f"token ids in {param} must be below {info.vocab_size}, got {token_id}", param=param
                )
    num_prompt, limit = len(prompt_token_ids), info.max_model_len
    # "maximum context length": OpenAI's words, by which litellm and others know this error.
    if num_prompt >= limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, prompt and answer together, "
            f"but the prompt alone has {num_prompt}: shorten it to at most {limit - 1}",
            param="prompt",
        )
    if sampling.max_tokens is not None and num_prompt + sampling.max_tokens > limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, prompt and answer together, but the "
            f"prompt has {num_prompt} and max_tokens is {sampling.max_tokens}: "
            f"set max_tokens to at most {limit - num_prompt}",
            param="max_tokens",
        )
