"""How likely a prompt's own tokens are: what ``prompt_logprobs`` and ``echo`` with ``logprobs`` ask for.

Evaluation harnesses compare answers by it. Logits of every token of a prompt would take gigabytes, so
they are made and used a few rows at a time.
"""

from __future__ import annotations

import torch

from minivllm.engine.scheduler import ScheduledBatch
from minivllm.models.llama import Llama
from minivllm.request import TokenLogprob

_NUM_ROWS = 64
"""Logits at a time."""


def score_prompts(model: Llama, hidden_TN: torch.Tensor, batch: ScheduledBatch) -> None:
    """Set ``prompt_logprobs`` of the batch's requests that ask for them; waits for the device then.

    Args:
        hidden_TN: the step's, for all of its tokens.
    """
    start_T = 0
    for item in batch.requests:
        request, count = item.request, item.request.sampling.prompt_logprobs
        # Each token of the prompt says how likely the next one is; the last one's is sampled.
        num_scored = min(item.start + item.num_tokens, request.num_prompt_tokens - 1) - item.start
        if count is not None and num_scored > 0:
            targets = request.prompt_token_ids[item.start + 1 : item.start + 1 + num_scored]
            item.prompt_logprobs = []
            for first in range(0, num_scored, _NUM_ROWS):
                rows = range(first, min(first + _NUM_ROWS, num_scored))
                index = torch.tensor([start_T + row for row in rows], device=hidden_TN.device)
                logits_LV = model.logits(hidden_TN, index)
                item.prompt_logprobs += _score(logits_LV, targets[rows.start : rows.stop], count)
        start_T += item.num_tokens


def _score(logits_LV: torch.Tensor, token_ids: list[int], count: int) -> list[TokenLogprob]:
    """One entry for each row: its token's log probability and rank, and the ``count`` most likely ones."""
    table_LV = torch.log_softmax(logits_LV.float(), dim=-1)
    chosen_L1 = table_LV.gather(1, torch.tensor(token_ids, device=logits_LV.device)[:, None])
    ranks = ((table_LV > chosen_L1).sum(dim=-1) + 1).tolist()
    top_values, top_ids = (values.tolist() for values in table_LV.topk(min(count, table_LV.shape[1]), dim=-1))
    return [
        TokenLogprob(token_id, logprob, list(zip(ids, values, strict=True)), rank)
        for token_id, logprob, ids, values, rank in zip(
            token_ids, chosen_L1.squeeze(1).tolist(), top_ids, top_values, ranks, strict=True
        )
    ]
