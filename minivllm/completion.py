"""One completion's engine events turned into text: detokenization, stop strings, what to stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.request import (
    CompletionOutput,
    EngineEvent,
    FinishReason,
    RequestMetrics,
    SamplingParams,
    TokenLogprob,
)
from minivllm.tokenizer.detokenizer import IncrementalDetokenizer
from minivllm.tokenizer.stop import StopStringMatcher
from minivllm.tokenizer.tokenizer import Tokenizer


@dataclass(slots=True)
class CompletionDelta:
    """What one event adds to a completion."""

    text: str
    """May be empty: half a character, or what may become a stop string, is held back."""
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    """One for each of ``token_ids``, where asked for."""
    finish_reason: FinishReason | None
    """Set in the last delta."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """In the first delta, where asked for: one for each token of the prompt but the first."""


class CompletionStream:
    """Collects one completion, event by event.

    The text ends before the first stop string (after it, where it is to be shown), wherever token edges
    lie; ``token_ids`` and ``logprobs`` include the token that completed it. A stop string counts only if
    it begins in text that appeared after the first ``min_tokens`` tokens. The token with which the engine
    itself stopped (end of turn, a stop id) is in ``token_ids`` and shows no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        index: int = 0,
        *,
        shown_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """``shown_token_ids``: special tokens that show their text all the same."""
        self.needs_abort = False
        """A stop string was found while the engine goes on: the caller must abort the request there."""
        self._min_tokens = sampling.min_tokens
        self._shows_stop = sampling.include_stop_str_in_output
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            prompt_token_ids,
            skip_special_tokens=sampling.skip_special_tokens,
            shown_token_ids=shown_token_ids,
        )
        self._matcher = StopStringMatcher(sampling.stop, shows_stop=self._shows_stop)
        self._texts: list[str] = []  # not in the output yet: joining at every token would be quadratic
        self._output = CompletionOutput(
            index=index,
            text="",
            token_ids=[],
            finish_reason=None,
            logprobs=None if sampling.logprobs is None else [],
            metrics=RequestMetrics(),
        )

    @property
    def output(self) -> CompletionOutput:
        """Everything so far."""
        if self._texts:
            self._output.text += "".join(self._texts)
            self._texts.clear()
        return self._output

    @property
    def is_finished(self) -> bool:
        """Whether there is a finish reason; later events add nothing but metrics."""
        return self._output.finish_reason is not None

    def push(self, event: EngineEvent) -> CompletionDelta:
        """Take the engine's next event for this request; what it adds."""
        if event.metrics is not None:
            self._output.metrics = event.metrics
        if self.is_finished:
            return CompletionDelta("", [], None if self._output.logprobs is None else [], None)

        texts: list[str] = []
        num_tokens = 0
        # Where the engine stopped, the last token is the stop itself.
        hidden = 1 if event.finish_reason is FinishReason.STOP and not self._shows_stop else 0
        for position, token_id in enumerate(event.new_token_ids):
            num_tokens += 1
            if position < len(event.new_token_ids) - hidden:
                texts.append(self._show(self._detokenizer.push([token_id]), len(self._output.token_ids)))
            self._output.token_ids.append(token_id)
            if self._matcher.is_stopped:
                break
        if event.finish_reason is not None:
            texts.append(self._show(self._detokenizer.flush(), len(self._output.token_ids)))
            texts.append(self._matcher.flush())

        if self._matcher.is_stopped:
            self._output.finish_reason = FinishReason.STOP
            self.needs_abort = event.finish_reason is None
        else:
            self._output.finish_reason = event.finish_reason
        logprobs = None
        if self._output.logprobs is not None:
            logprobs = (event.logprobs or [])[:num_tokens]
            self._output.logprobs.extend(logprobs)
        text = "".join(texts)
        self._texts.append(text)
        if event.prompt_logprobs is not None:
            self._output.prompt_logprobs = event.prompt_logprobs
        return CompletionDelta(
            text,
            event.new_token_ids[:num_tokens],
            logprobs,
            self._output.finish_reason,
            event.prompt_logprobs,
        )

    def _show(self, text: str, num_tokens_before: int) -> str:
        """What of newly decoded text can be shown now; the first ``min_tokens`` tokens' always can."""
        return text if num_tokens_before < self._min_tokens else self._matcher.push(text)
