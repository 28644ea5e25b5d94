"""The answer to one HTTP request, from what its samples bring: whole, or as a stream."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from minivllm.completion import CompletionDelta
from minivllm.request import CompletionOutput, FinishReason, Terms, TokenLogprob
from minivllm.server.admission import Ticket
from minivllm.server.context import ServerContext
from minivllm.server.formats import Choice, Format, Logprobs
from minivllm.server.generation import OnDelta, Sample, run_samples
from minivllm.server.logprobs import with_top
from minivllm.server.protocol import GenerationRequest
from minivllm.server.record import RequestRecord
from minivllm.server.responses import StopReason, Usage
from minivllm.server.streaming import Emit
from minivllm.tokenizer.detokenizer import IncrementalDetokenizer


@dataclass(frozen=True, slots=True)
class Answer:
    """What ``body`` asks for, in the words of ``wording``."""

    context: ServerContext
    body: GenerationRequest
    id: str
    wording: Format
    samples: list[Sample]
    samples_per_prompt: int
    record: RequestRecord
    ticket: Ticket
    terms: Terms
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, object]:
        """Run all samples, then word them."""
        outputs = await self._run()
        choices = [self._choice(index, output) for index, output in enumerate(self._best(outputs))]
        content = self._envelope(self.wording.object_name, choices) | {"usage": self._usage(outputs)}
        count = self.body.prompt_logprobs
        if count is not None:
            of_prompts = [output.prompt_logprobs or [] for output in outputs[:: self.samples_per_prompt]]
            self.wording.add_prompt_logprobs(content, [with_top(known, count) for known in of_prompts])
        return content

    async def stream(self, emit: Emit) -> None:
        """Run all samples, wording each piece as it comes."""
        options = self.body.stream_options
        include_usage = options is not None and options.include_usage
        counts_always = options is not None and options.continuous_usage_stats
        num_tokens = 0
        begun: set[int] = set()

        async def emit_chunk(choices: list[Choice], usage: Usage | None = None) -> None:
            chunk = self._envelope(self.wording.chunk_object_name, choices)
            if counts_always and usage is None:
                usage = self._count(num_tokens)
            await emit(chunk | {"usage": usage} if include_usage or counts_always else chunk)

        async def emit_choice(choice: Choice | None) -> None:
            if choice is not None:
                await emit_chunk([choice])

        async def on_delta(index: int, delta: CompletionDelta) -> None:
            nonlocal num_tokens
            if not self.body.only_echoes:
                num_tokens += len(delta.token_ids)
            if self.body.echoes and index not in begun:
                begun.add(index)
                text, logprobs = self._echo(self.samples[index], delta.prompt_logprobs)
                await emit_choice(self.wording.chunk_choice(index, text, logprobs))
            # No text yet: half a character, or what may become a stop string.
            if (delta.text or delta.logprobs) and not self.body.only_echoes:
                found: Logprobs = None if delta.logprobs is None else [*delta.logprobs]
                await emit_choice(self.wording.chunk_choice(index, delta.text, found))
            if delta.finish_reason is not None:
                for choice in self.wording.closing(index, self._stop_reason(delta.finish_reason)):
                    await emit_choice(choice)

        for sample in self.samples:
            self._begin(sample.index, sample)
            await emit_choice(self.wording.opening(sample.index))
        outputs = await self._run(on_delta)
        if include_usage:
            await emit_chunk([], self._usage(outputs))

    async def _run(self, on_delta: OnDelta | None = None) -> list[CompletionOutput]:
        return await run_samples(
            self.context,
            self.samples,
            self.ticket,
            self.terms,
            self.wording.shown_token_ids,
            self.record,
            on_delta,
        )

    def _best(self, outputs: list[CompletionOutput]) -> list[CompletionOutput]:
        """Of each prompt's outputs the ``num_answers`` with the most likely tokens, on average."""
        if self.samples_per_prompt == self.body.num_answers:
            return outputs
        best: list[CompletionOutput] = []
        for start in range(0, len(outputs), self.samples_per_prompt):
            group = outputs[start : start + self.samples_per_prompt]
            best += sorted(group, key=_mean_logprob, reverse=True)[: self.body.num_answers]
        return best

    def _begin(self, index: int, sample: Sample) -> None:
        self.wording.begin(index, [] if self.body.echoes else sample.prompt_token_ids)

    def _choice(self, index: int, output: CompletionOutput) -> Choice:
        sample, text = self.samples[output.index], output.text
        self._begin(index, sample)
        logprobs: Logprobs = None if output.logprobs is None else [*output.logprobs]
        if not self.body.wants_logprobs:  # they were for finding the best
            logprobs = None
        if self.body.only_echoes:
            text, logprobs = "", None if logprobs is None else []
        if self.body.echoes:
            prompt_text, prompt_entries = self._echo(sample, output.prompt_logprobs)
            text = prompt_text + text
            logprobs = None if logprobs is None else [*(prompt_entries or []), *logprobs]
        return self.wording.choice(index, text, logprobs, self._stop_reason(output.finish_reason))

    def _echo(self, sample: Sample, known: list[TokenLogprob] | None) -> tuple[str, Logprobs]:
        """A prompt as an answer begins with it. Of its first token no probability is known."""
        detokenizer = IncrementalDetokenizer(
            self.context.tokenizer, [], skip_special_tokens=sample.sampling.skip_special_tokens
        )
        text = detokenizer.push(sample.prompt_token_ids)
        if self.body.only_echoes:  # else what is left of a character comes with the answer's first token
            text += detokenizer.flush()
        if not self.body.wants_logprobs or known is None:
            return text, None
        return text, [sample.prompt_token_ids[0], *with_top(known, sample.sampling.logprobs or 0)]

    def _stop_reason(self, reason: FinishReason | None) -> StopReason:
        """OpenAI's word for it. Requests that were aborted or failed have no answer to word."""
        return "length" if reason is FinishReason.LENGTH or self.body.only_echoes else "stop"

    def _envelope(self, object_name: str, choices: list[Choice]) -> dict[str, object]:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.context.model_name,
            "choices": choices,
        }

    def _count(self, completion_tokens: int) -> Usage:
        prompts = self.samples[:: self.samples_per_prompt]
        prompt_tokens = sum(len(sample.prompt_token_ids) for sample in prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _usage(self, outputs: list[CompletionOutput]) -> Usage:
        """Of all that was generated, whether it is in the answer or not."""
        num_tokens = 0 if self.body.only_echoes else sum(len(output.token_ids) for output in outputs)
        cached = sum(output.metrics.num_cached_tokens for output in outputs[:: self.samples_per_prompt])
        return self._count(num_tokens) | {"prompt_tokens_details": {"cached_tokens": cached}}


def _mean_logprob(output: CompletionOutput) -> float:
    logprobs = [entry.logprob for entry in output.logprobs or []]
    return sum(logprobs) / max(len(logprobs), 1)
