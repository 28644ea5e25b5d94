"""From a checked HTTP request to finished samples: token ids, one engine request per sample, outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from minivllm.completion import CompletionDelta, CompletionStream
from minivllm.errors import InvalidRequestError, RequestFailedError
from minivllm.request import CompletionOutput, FinishReason, SamplingParams, Terms, check_request
from minivllm.server.admission import Ticket
from minivllm.server.context import ServerContext
from minivllm.server.record import RequestRecord
from minivllm.server.streaming import run_all

OnDelta = Callable[[int, CompletionDelta], Awaitable[None]]
"""Called with a sample's index and what a step brought it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One of the sequences that an HTTP request asks for: a request of its own to the engine."""

    index: int
    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams


def make_samples(
    context: ServerContext,
    request_id: str,
    prompts: list[list[int]],
    sampling: SamplingParams,
    default_max_tokens: int | None,
) -> list[Sample]:
    """``sampling.n`` samples of each prompt, each prompt checked: none starts unless all can be served.

    Where ``sampling.max_tokens`` is open, it becomes ``default_max_tokens``, what the context holds or a
    sample's share of ``context.max_tokens_per_request``, whichever is least.
    """
    info, limit = context.engine.info, context.max_tokens_per_request
    share = None if limit is None else _share(limit, len(prompts) * sampling.n, sampling.max_tokens)
    samples: list[Sample] = []
    for prompt in prompts:
        check_request(prompt, sampling, info)
        room = info.max_model_len - len(prompt)
        max_tokens = sampling.max_tokens or min(default_max_tokens or room, share or room, room)
        for i in range(sampling.n):
            own = sampling.for_sample(i, max_tokens)
            samples.append(Sample(len(samples), f"{request_id}-{len(samples)}", prompt, own))
    return samples


def _share(limit: int, num_samples: int, max_tokens: int | None) -> int:
    """How many of ``limit`` tokens each sample may have. Refuses more of them."""
    if num_samples * (max_tokens or 1) > limit:
        each = "" if max_tokens is None else f" of {max_tokens} tokens"
        raise InvalidRequestError(
            f"prompts times n times max_tokens must be at most {limit} (--max-tokens-per-request), "
            f"got {num_samples} samples{each}",
            param="max_tokens",
        )
    return limit // num_samples


async def run_samples(
    context: ServerContext,
    samples: list[Sample],
    ticket: Ticket,
    terms: Terms,
    shown_token_ids: frozenset[int],
    record: RequestRecord,
    on_delta: OnDelta | None = None,
) -> list[CompletionOutput]:
    """Run all samples at once; when one fails, or this is cancelled, the others are aborted.

    ``ticket`` is their request's, ``terms`` are what the engine is told of it; ``shown_token_ids`` are
    special tokens that show their text all the same; ``record`` gets the outputs as far as they come.
    """
    return await run_all(
        _run_sample(context, sample, ticket, terms, shown_token_ids, record, on_delta) for sample in samples
    )


async def _run_sample(
    context: ServerContext,
    sample: Sample,
    ticket: Ticket,
    terms: Terms,
    shown_token_ids: frozenset[int],
    record: RequestRecord,
    on_delta: OnDelta | None,
) -> CompletionOutput:
    stream = CompletionStream(
        context.tokenizer,
        sample.prompt_token_ids,
        sample.sampling,
        sample.index,
        shown_token_ids=shown_token_ids,
    )
    record.outputs[sample.index] = stream.output
    events = context.engine.generate(sample.request_id, sample.prompt_token_ids, sample.sampling, terms)
    with context.metrics.following(
        sample.request_id, len(sample.prompt_token_ids), sample.sampling.max_tokens, record.received_at
    ) as sequence:
        async with contextlib.aclosing(events):
            async for event in events:
                ticket.start()
                ticket.num_used_tokens += len(event.new_token_ids)
                if not event.new_token_ids and event.finish_reason is None:
                    continue  # its prompt has been begun, and that is all
                if event.finish_reason is FinishReason.ABORT:
                    raise RequestFailedError("the engine ended the request before it was finished")
                delta = stream.push(event)
                if on_delta is not None:
                    await on_delta(sample.index, delta)
                if stream.is_finished:
                    sequence.has_stop_string = stream.needs_abort
                    break
    return stream.output
