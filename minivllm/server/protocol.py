"""What clients may send: the fields of each route, their types, and which of them go together.

Types are strict (no ``"5"`` for 5, no ``true`` for 1) and every field has an effect: one that isn't
supported yet is refused by name, an unknown one with the nearest known. A field that is null counts as
not given, as clients send nulls for what they leave open. Ranges of sampling fields are not here but in
:class:`minivllm.request.SamplingParams`, where the offline API meets them too.
"""

from __future__ import annotations

import reprlib
from abc import abstractmethod
from dataclasses import fields
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Discriminator, Field, Tag, model_validator

from minivllm.errors import InvalidRequestError
from minivllm.request import MAX_LOGPROBS, SamplingParams
from minivllm.server.message_protocol import Messages, kind_of_text_or_list
from minivllm.server.strict import StrictModel
from minivllm.server.structured_protocol import ResponseFormat, StructuredOutputs, make_grammar
from minivllm.server.tool_protocol import ToolFields

MAX_SAMPLES = 1024
"""Most sequences that one request may ask for: prompts times n."""

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
"""An integer that fits the message to the engine. JSON's have no limit."""


def _kind_of_prompt(value: Any) -> str | None:
    if not isinstance(value, list):
        return "<text>" if isinstance(value, str) else None
    if not value:
        return None
    first = value[0]
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"


# fail_fast, wherever a list can be long: millions of wrong items must not become millions of errors.
TokenIds = Annotated[list[int], Field(fail_fast=True)]

Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_SAMPLES), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_SAMPLES), Tag("<lists>")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="expected",
        custom_error_message="a string, a list of strings, a list of token ids or a list of such lists, "
        "and not empty",
    ),
]

Stop = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Field(fail_fast=True), Tag("<list>")],
    Discriminator(
        kind_of_text_or_list,
        custom_error_type="expected",
        custom_error_message="a string or a list of strings",
    ),
]


class StreamOptions(StrictModel):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Whether every chunk counts the tokens so far, not the last one alone."""
    include_obfuscation: Literal[False] = False
    """Padding against eavesdroppers who measure: there is none."""


class GenerationRequest(StrictModel):
    """The fields that completions and chat share. None is "not given"."""

    unsupported = frozenset(
        {
            "allowed_token_ids",
            "bad_words",
            "cache_salt",
            "data_parallel_rank",
            "early_stopping",
            "guided_choice",
            "guided_decoding_backend",
            "guided_grammar",
            "guided_json",
            "guided_regex",
            "kv_transfer_params",
            "length_penalty",
            "logits_processors",
            "min_tokens_to_keep",
            "repetition_detection",
            "request_id",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "spaces_between_special_tokens",
            "use_beam_search",
            "vllm_xargs",
        }
    )

    default_max_tokens: ClassVar[int | None] = None
    """Of a request that gives none; None: what the context holds."""

    model: str | None = None
    """Left out: the served model."""
    max_tokens: Int | None = None
    n: Int | None = None
    min_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int | None = None
    logit_bias: dict[str, float] | None = None
    """By token id."""
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Int | None = None
    truncate_prompt_tokens: Annotated[Int, Field(ge=1)] | None = None
    """Keep only so many tokens of a prompt, the last ones."""
    add_special_tokens: bool | None = None
    """Left out: only to a prompt, as a chat template writes its own."""
    priority: Int = 0
    """The lower, the sooner a request leaves the queue."""
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = None
    """Seconds after which the answer is of no use: the request is dropped then, with 504."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    # OpenAI's fields about accounts, billing and caches, which mean nothing here and do no harm.
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: Literal[False] = False
    user: str | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed with stream: true", param="stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError(
                "prompt_logprobs is only allowed with stream: false", param="prompt_logprobs"
            )
        return self

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with its prompt."""
        return False

    @property
    def only_echoes(self) -> bool:
        """Whether nothing is to be generated: OpenAI lets a prompt be scored with ``max_tokens: 0``."""
        return False

    @property
    @abstractmethod
    def wants_logprobs(self) -> bool:
        """Whether each token of an answer comes with its log probability."""

    @property
    def num_answers(self) -> int:
        """Answers for each prompt: where more are generated, the best of them."""
        return 1 if self.n is None else self.n

    def sampling_params(self) -> SamplingParams:
        """The sampling fields, checked. ``max_tokens`` is None where the request leaves it open."""
        given = self._sampling_fields()
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        # Fields that are not given keep the defaults of SamplingParams, which are written only there.
        return SamplingParams(**{"max_tokens": None, **{k: v for k, v in given.items() if v is not None}})

    def given_name(self, param: str | None) -> str | None:
        """What this request calls the field that :func:`minivllm.request.check_request` calls ``param``."""
        return param

    @cached_property
    def grammar_and_param(self) -> tuple[str | None, str | None]:
        """The answer's grammar and the field that asks for it, if one does. Made once: it may be long."""
        return make_grammar(self.response_format, self.structured_outputs)

    def _sampling_fields(self) -> dict[str, Any]:
        given = {field.name: getattr(self, field.name, None) for field in fields(SamplingParams)}
        return given | {"grammar": self.grammar_and_param[0]}


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 20):
        raise InvalidRequestError(
            f"logit_bias must map token ids to numbers, got the key {key[:80]!r}", param="logit_bias"
        )
    return int(key)


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    unsupported = GenerationRequest.unsupported | {"prompt_embeds", "suffix"}
    default_max_tokens = 16

    prompt: Prompt
    logprobs: Int | None = None
    """How many of the most likely tokens to tell with each token; 0: only the sampled one."""
    echo: bool = False
    """Whether an answer begins with its prompt; with ``logprobs``, with the prompt's, too."""
    best_of: Int | None = None
    """Generate so many, and answer with the ``n`` whose tokens were the most likely on average."""

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None:
            n = self.num_answers
            if self.best_of < n:
                raise InvalidRequestError(
                    f"best_of must be at least n, which is {n}, got {self.best_of}", param="best_of"
                )
            if self.best_of > n and self.stream:
                raise InvalidRequestError(
                    f"best_of can't be more than n with stream: true, got {self.best_of} and n {n}",
                    param="best_of",
                )
        return self

    @property
    def wants_logprobs(self) -> bool:
        """See :meth:`GenerationRequest.wants_logprobs`."""
        return self.logprobs is not None

    @property
    def echoes(self) -> bool:
        """See :meth:`GenerationRequest.echoes`."""
        return self.echo

    @property
    def only_echoes(self) -> bool:
        """See :meth:`GenerationRequest.only_echoes`."""
        return self.echo and self.max_tokens == 0

    @property
    def prompts(self) -> list[str | list[int]]:
        """``prompt`` as a list, whether it is one or several."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if is_single else self.prompt)

    def sampling_params(self) -> SamplingParams:
        """See :meth:`GenerationRequest.sampling_params`. ``n`` is the number to generate."""
        sampling, num_prompts = super().sampling_params(), len(self.prompts)
        if num_prompts * sampling.n > MAX_SAMPLES:
            raise InvalidRequestError(
                f"prompts times n (or best_of) must be at most {MAX_SAMPLES}, "
                f"got {num_prompts} times {sampling.n}",
                param="prompt",
            )
        return sampling

    def _sampling_fields(self) -> dict[str, Any]:
        fields = super()._sampling_fields()
        if self.best_of is not None and self.best_of > self.num_answers:
            fields |= {"n": self.best_of, "logprobs": self.logprobs or 0}
        if self.echo and self.logprobs is not None:
            # The engine is asked for the greater number; each use takes as many as it asked for.
            given = self.prompt_logprobs
            if given is None or 0 <= given < self.logprobs:
                fields["prompt_logprobs"] = self.logprobs
        if self.only_echoes:
            fields |= {"max_tokens": 1, "min_tokens": None}
        return fields

    def given_name(self, param: str | None) -> str | None:
        """See :meth:`GenerationRequest.given_name`."""
        if param == "n" and self.best_of is not None and self.best_of > self.num_answers:
            return "best_of"
        return param


class ChatRequest(ToolFields, GenerationRequest):
    """``POST /v1/chat/completions``."""

    unsupported = GenerationRequest.unsupported | {
        # OpenAI's
        "audio",
        "modalities",
        "moderation",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
        # vLLM's
        "chat_template",
        "documents",
        "echo",
        "include_reasoning",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "thinking_token_budget",
    }

    messages: Messages
    add_generation_prompt: bool | None = None
    """Whether the prompt ends with what begins an answer. Left out: unless the last message goes on."""
    continue_final_message: bool = False
    """Whether the answer goes on with the last message."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables for the chat template; only those that it reads."""
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    """The newer name of ``max_tokens``."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed with logprobs: true", param="top_logprobs"
            )
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise InvalidRequestError(
                    "max_tokens and max_completion_tokens are two names of one limit, but "
                    f"{self.max_tokens} and {self.max_completion_tokens} were given",
                    param="max_completion_tokens",
                )
            self.max_tokens = self.max_completion_tokens
        for name, value in (self.chat_template_kwargs or {}).items():
            if not isinstance(value, (str, int, float, bool)):
                raise InvalidRequestError(
                    "chat_template_kwargs must hold strings, numbers and booleans, "
                    f"got {reprlib.repr(value)}",
                    param=f"chat_template_kwargs.{name[:80]}",
                )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        return self

    @property
    def wants_logprobs(self) -> bool:
        """See :meth:`GenerationRequest.wants_logprobs`."""
        return self.logprobs

    @property
    def template_options(self) -> dict[str, Any]:
        """For :meth:`minivllm.tokenizer.tokenizer.Tokenizer.apply_chat_template`."""
        return {
            "add_generation_prompt": self.add_generation_prompt is not False,
            "continue_final_message": self.continue_final_message,
            "extra": self.chat_template_kwargs,
        }

    def given_name(self, param: str | None) -> str | None:
        """See :meth:`GenerationRequest.given_name`."""
        if param == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return "messages" if param == "prompt" else param

    def _sampling_fields(self) -> dict[str, Any]:
        return super()._sampling_fields() | {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class TokenizeRequest(StrictModel):
    """``POST /tokenize``: a text, or a chat through the model's template."""

    unsupported = frozenset(
        {
            "chat_template",
            "mm_processor_kwargs",
            "return_token_strs",
            "tools",
        }
    )

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Left out: only to a prompt, as a chat template writes its own."""

    @model_validator(mode="after")
    def _check_one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("either prompt or messages is required, and not both", param="prompt")
        return self


class DetokenizeRequest(StrictModel):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: TokenIds
