"""The shapes of the answers. Dictionaries, not models: one is made and written for every token streamed,
and OpenAI tells apart a key that is null from one that is absent.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

StopReason = Literal["stop", "length", "tool_calls"]


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(TypedDict):
    """The body of every answer that isn't a 200, and an event in a stream that fails midway."""

    error: ErrorDetail


class PromptTokensDetails(TypedDict):
    """Of the prompt tokens, those whose keys and values were in the cache."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens, over all prompts and all samples. A chunk's count has no details yet."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]


class CompletionLogprobs(TypedDict):
    """Parallel lists, one entry for each token. Nothing is known of the first of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """How likely a token was at a place of the prompt. ``rank`` is 1 for the most likely one."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""vLLM's: for each token of the prompt, by token id, itself and the most likely ones; null for the first."""


class CompletionChoice(TypedDict):
    """One answer of ``/v1/completions``, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: StopReason | None
    prompt_logprobs: NotRequired[PromptLogprobs]


class Completion(TypedDict):
    """The answer of ``/v1/completions``; streamed, each chunk has the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    """One of the most likely tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """The sampled token, and the most likely ones beside it."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log probabilities of a message's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    """A function's name, and the JSON text of its arguments, which the client must check."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A function that the model wants called."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    """None where there is none, but might be tool calls or reasoning."""
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One answer of ``/v1/chat/completions``."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: StopReason


class ChatCompletion(TypedDict):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs]


class CalledFunctionDelta(TypedDict):
    """The name, in a call's first delta, and more of the arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """What a chunk adds to one of the calls."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class ChatDelta(TypedDict):
    """What a chunk adds to the message: the role first, then text or calls, and nothing in the last."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(TypedDict):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: StopReason | None


class ChatChunk(TypedDict):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    """A model that this server serves."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["minivllm"]
    max_model_len: int


class ModelList(TypedDict):
    """All of them: one."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """Whether the server takes requests, and how busy it is."""

    status: Literal["ok", "draining", "restarting"]
    num_running: int
    num_waiting: int
    kv_cache_usage: float


class QueuePosition(TypedDict):
    """Where a request stands."""

    id: str
    status: Literal["waiting", "running"]
    position: int
    """1: the next one; 0: it runs."""
    num_waiting: int
    estimated_start_seconds: float | None
    """From how the queue has moved in the last minute; null: it hasn't."""


class Version(TypedDict):
    """Which minivllm this is."""

    version: str


class Tokenized(TypedDict):
    """A prompt as the model sees it."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(TypedDict):
    """Token ids as text, special tokens included."""

    prompt: str
