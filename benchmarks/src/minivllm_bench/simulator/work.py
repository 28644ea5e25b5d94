"""What a step has to compute, as the few numbers that its cost depends on."""

from __future__ import annotations

from typing import NamedTuple

from minivllm.engine.scheduler import ScheduledBatch
from minivllm.engine.steps import StepRecord


class StepWork(NamedTuple):
    """Sums over the sequences of a step."""

    sequences: int
    tokens: int
    """That go through the layers."""
    sampled: int
    """That logits are made for."""
    decode_context: int
    """Keys that decodes look at: of each, all tokens up to its own."""
    prefill_context: int
    """Keys that prefill chunks read, each once for all of the chunk's queries."""
    prefill_pairs: int
    """Pairs of a query of a prefill chunk and a key that it looks at: this is what grows quadratically."""

    @classmethod
    def of_batch(cls, batch: ScheduledBatch) -> StepWork:
        """What the scheduler has chosen. Called in every simulated step: no more Python than it takes."""
        tokens = sampled = decode_context = prefill_context = pairs = 0
        for item in batch.requests:
            num_tokens, start = item.num_tokens, item.start
            sampled += item.is_sampled
            if num_tokens == 1:
                decode_context += start + 1
                tokens += 1
            else:
                tokens += num_tokens
                prefill_context += start + num_tokens
                pairs += _pairs(start, num_tokens)
        return cls(len(batch.requests), tokens, sampled, decode_context, prefill_context, pairs)

    @classmethod
    def of_record(cls, record: StepRecord) -> StepWork:
        """What a step that was measured had to compute."""
        chunks = [item for item in record.prefills if item.num_tokens > 1]
        ones = [item.start for item in record.prefills if item.num_tokens == 1]
        decodes = [*record.decodes.values(), *ones]
        return cls(
            sequences=len(record.decodes) + len(record.prefills),
            tokens=len(decodes) + sum(item.num_tokens for item in chunks),
            sampled=len(record.decodes) + sum(item.is_last for item in record.prefills),
            decode_context=sum(decodes) + len(decodes),
            prefill_context=sum(item.start + item.num_tokens for item in chunks),
            prefill_pairs=sum(_pairs(item.start, item.num_tokens) for item in chunks),
        )


def _pairs(start: int, num_tokens: int) -> int:
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2
