"""What OpenAI's and vLLM's routes have, and how minivllm's differ: the written part of ``docs/api.md``."""

from __future__ import annotations

import typing

from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from minivllm.server.message_protocol import MAX_MESSAGES

COMPLETIONS, CHAT = "POST /v1/completions", "POST /v1/chat/completions"

OPENAI: dict[str, frozenset[str]] = {
    route: frozenset({*typing.get_type_hints(params.CompletionCreateParamsBase), "stream"})
    for route, params in ((COMPLETIONS, completion_params), (CHAT, chat_params))
}
"""From the installed package."""

_VLLM_BOTH = """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty response_format seed stop stream
    stream_options temperature top_p use_beam_search top_k min_p repetition_penalty watermarking
    length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids
    allowed_token_ids bad_words add_special_tokens structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection thinking_token_budget echo user
    stream_interval routed_experts_prompt_start
"""
OLDER_VLLM = frozenset(
    """best_of guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
    logits_processors""".split()
)
"""What vLLM had before."""
VLLM: dict[str, frozenset[str]] = {
    COMPLETIONS: frozenset((_VLLM_BOTH + "prompt prompt_embeds").split()),
    CHAT: frozenset(
        (
            _VLLM_BOTH
            + """messages top_logprobs max_completion_tokens tools tool_choice parallel_tool_calls
            reasoning_effort include_reasoning add_generation_prompt continue_final_message documents
            chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text"""
        ).split()
    ),
    "POST /tokenize": frozenset(
        """model prompt messages add_special_tokens add_generation_prompt continue_final_message
        return_token_strs chat_template chat_template_kwargs mm_processor_kwargs tools""".split()
    ),
    "POST /detokenize": frozenset({"model", "tokens"}),
}

ROUTES: dict[str, tuple[str, str, str]] = {
    CHAT: ("an answer to messages", "yes", "yes"),
    COMPLETIONS: ("text that goes on from a prompt", "yes", "yes"),
    "GET /v1/models": ("the one served model", "yes", "yes"),
    "GET /v1/models/{name}": ("that model, by its name", "yes", "no"),
    "POST /tokenize": ("a text, or messages through the chat template, as token ids", "no", "yes"),
    "POST /detokenize": ("token ids as text", "no", "yes"),
    "GET /health": (
        "200 while the server lives, 503 if its engine keeps failing",
        "no",
        "differs: no body",
    ),
    "GET /ready": ("200 while requests can be served, else 503", "no", "no"),
    "GET /ping": ("the same as `/health`", "no", "differs: no body"),
    "GET /v1/queue/{request_id}": ("where one of the caller's requests stands", "no", "no"),
    "GET /version": ("minivllm's version", "no", "yes"),
    "GET /metrics": ("what the server and its engine are doing, in numbers", "no", "differs: needs a key"),
    "GET /openapi.json": ("this, for machines", "no", "yes"),
}
"""What a route is for, and whether OpenAI and vLLM have it."""

ABOUT: dict[str | tuple[str, str], str] = {
    "messages": f"The conversation, of at most {MAX_MESSAGES:,}, text parts and tool calls counted with "
    "them; their fields are in `/openapi.json`.",
    ("POST /tokenize", "prompt"): "A text; it or `messages`.",
    "model": "Left out: the served model.",
    (COMPLETIONS, "prompt"): "What to go on from; several prompts give several answers each.",
    "tokens": "Token ids.",
    "stream": "Whether the answer comes as server-sent events.",
    "stream_options": "Only with `stream`.",
    "response_format": "See [structured output](structured_output.md).",
    "structured_outputs": "See [structured output](structured_output.md).",
    (CHAT, "tools"): "See [tools](tools.md).",
    **dict.fromkeys(
        ["guided_choice", "guided_grammar", "guided_json", "guided_regex"], "Use `structured_outputs`."
    ),
    (CHAT, "max_tokens"): "Most tokens to generate. Left out or null: as many as the context still holds and "
    "`--max-tokens-per-request` allows.",
    (COMPLETIONS, "max_tokens"): "Most tokens to generate. Left out or null: 16. 0 only with `echo`: "
    "the prompt alone.",
    (CHAT, "logprobs"): "Whether each token comes with its log probability.",
    "top_logprobs": "How many of the most likely tokens to tell with each token; only with `logprobs`.",
    "suffix": "vLLM refuses it, too.",
}
"""Of fields that the code says nothing about, or something else on one route."""

DIFFERS: dict[str | tuple[str, str], str] = {
    "seed": "OpenAI promises no more than its best effort.",
    "temperature": "OpenAI ends at 2.",
    "stop": "OpenAI takes 4.",
    "priority": "vLLM needs a scheduling policy for it.",
    "timeout": "Also as the header X-Request-Timeout; the shorter one counts.",
    "truncate_prompt_tokens": "vLLM's -1, the whole context, is refused.",
    (COMPLETIONS, "logprobs"): "OpenAI ends at 5.",
    (CHAT, "messages"): "Text only: no images, no audio.",
    (CHAT, "chat_template_kwargs"): "vLLM drops what the template doesn't read; here it is refused.",
    (CHAT, "tool_choice"): "`allowed_tools` and custom tools of OpenAI's are refused.",
    (CHAT, "tools"): "Functions only: no custom tools.",
    "stream_options": "`include_obfuscation` may only be false: there is none.",
    "structured_outputs": "`json`, `regex`, `grammar` or `choice`; vLLM's further keys are refused.",
}
"""How a field differs, on all routes or on one."""
