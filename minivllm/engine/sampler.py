"""From logits to tokens, for the whole batch at once.

The order is: penalties and the mask of end-of-turn tokens, temperature, min-p, top-k, top-p, draw.

A draw is the inverse of the cumulative distribution at one uniform number per token, and that
number is a hash of the request's seed and of how many tokens it has: nothing a request samples
depends on who else is in the batch, on chunking, or on a preemption.

Shapes: L rows (requests that get a token), V vocabulary.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from minivllm.engine.scheduler import SampledToken
from minivllm.request import Request, SamplingParams, TokenLogprob

_CANDIDATES = 1024
"""Most likely tokens that are sorted first: enough for nearly every top-k and top-p, far cheaper than all."""

_MIN_TEMPERATURE = 1e-30
"""Below this, float32 would divide by zero; the draw is greedy long before."""


def sample(
    logits_LV: torch.Tensor, requests: list[Request], eos_token_ids: frozenset[int]
) -> list[SampledToken]:
    """Choose each request's next token.

    Args:
        logits_LV: any floating dtype; not mutated.
        requests: one for each row.
        eos_token_ids: masked while a request has fewer than ``min_tokens`` tokens.
    """
    params = [request.sampling for request in requests]
    scores_LV = logits_LV.float()
    penalised = [
        row
        for row, p in enumerate(params)
        if p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty
    ]
    if penalised:
        index = torch.tensor(penalised, device=logits_LV.device)
        penalised_scores = _penalise(scores_LV[index], [requests[row] for row in penalised])
        scores_LV = scores_LV.index_copy(0, index, penalised_scores)
    if any(request.num_output_tokens < request.sampling.min_tokens for request in requests):
        scores_LV = _mask_ends(scores_LV, requests, eos_token_ids)

    tokens_L = scores_LV.argmax(dim=-1)
    random_rows = [row for row, p in enumerate(params) if not p.is_greedy]
    if random_rows:
        index = torch.tensor(random_rows, device=logits_LV.device)
        uniform = _uniform([requests[row] for row in random_rows]).to(logits_LV.device)
        tokens_L[index] = _draw(scores_LV[index], [params[row] for row in random_rows], uniform)

    token_ids: list[int] = tokens_L.tolist()
    logprobs = _logprobs(logits_LV, token_ids, params)
    return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def _penalise(scores_LV: torch.Tensor, requests: list[Request]) -> torch.Tensor:
    """Repetition penalty (Keskar et al. 2019) on prompt and output; presence and frequency on output."""
    device = scores_LV.device

    def count(token_lists: list[list[int]]) -> torch.Tensor:
        rows = np.repeat(np.arange(len(token_lists)), [len(tokens) for tokens in token_lists])
        columns = np.fromiter(chain.from_iterable(token_lists), dtype=np.int64, count=len(rows))
        index = torch.from_numpy(rows * scores_LV.shape[1] + columns).to(device)
        return torch.bincount(index, minlength=scores_LV.numel()).view_as(scores_LV)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=device)[:, None]

    params = [request.sampling for request in requests]
    seen_LV = count([request.token_ids for request in requests]) > 0
    counts_LV = count([request.token_ids[request.num_prompt_tokens :] for request in requests])
    repetition = column([p.repetition_penalty for p in params])
    scores_LV = torch.where(
        seen_LV, torch.where(scores_LV > 0, scores_LV / repetition, scores_LV * repetition), scores_LV
    )
    scores_LV = scores_LV - column([p.frequency_penalty for p in params]) * counts_LV
    return scores_LV - column([p.presence_penalty for p in params]) * (counts_LV > 0)


def _mask_ends(
    scores_LV: torch.Tensor, requests: list[Request], eos_token_ids: frozenset[int]
) -> torch.Tensor:
    scores_LV = scores_LV.clone()
    for row, request in enumerate(requests):
        if request.num_output_tokens < request.sampling.min_tokens:
            scores_LV[row, [*eos_token_ids, *request.sampling.stop_token_ids]] = -torch.inf
    return scores_LV


def _uniform(requests: list[Request]) -> torch.Tensor:
    """One number in [0, 1) per request, from its seed and position: SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        seeds = np.array([request.seed for request in requests], dtype=np.int64).view(np.uint64)
        positions = np.array([request.num_output_tokens for request in requests], dtype=np.uint64)
        bits = _splitmix64(_splitmix64(seeds) + positions)
    # 48 bits: times any total it stays below that total, in float64.
    return torch.from_numpy((bits >> np.uint64(16)).astype(np.float64) * 2.0**-48)


def _splitmix64(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _draw(scores_LV: torch.Tensor, params: list[SamplingParams], uniform_L: torch.Tensor) -> torch.Tensor:
    """Draw one token per row. Every row has temperature > 0."""
    device = scores_LV.device
    temperature = torch.tensor([max(p.temperature, _MIN_TEMPERATURE) for p in params], device=device)
    # The largest score becomes 0 first, so that dividing by a tiny temperature can't overflow it.
    shifted_LV = scores_LV - scores_LV.amax(dim=-1, keepdim=True)
    probs_LV = torch.softmax(shifted_LV / temperature[:, None], dim=-1)

    is_filtered = torch.tensor([p.top_p < 1.0 or p.top_k > 0 or p.min_p > 0.0 for p in params])
    filtered, plain = is_filtered.nonzero().flatten(), (~is_filtered).nonzero().flatten()
    tokens_L = torch.empty_like(uniform_L, dtype=torch.int64)
    if len(plain):
        index = plain.to(device)
        tokens_L[index] = _inverse_cdf(probs_LV[index], uniform_L[index])
    if len(filtered):
        index = filtered.to(device)
        filters = [params[row] for row in filtered.tolist()]
        tokens_L[index] = _draw_filtered(probs_LV[index], filters, uniform_L[index], _CANDIDATES)
    return tokens_L


def _draw_filtered(
    probs_LV: torch.Tensor, params: list[SamplingParams], uniform_L: torch.Tensor, num_candidates: int
) -> torch.Tensor:
    """Draw from each row's most likely tokens: min-p, then top-k, then top-p (Holtzman et al. 2020).

    ``num_candidates`` tokens are sorted. A row that may keep more than those is drawn again from
    all of them: whether it is depends on that row alone, and so does the order of equal probabilities.
    """
    device, vocab_size = probs_LV.device, probs_LV.shape[1]
    num_candidates = min(num_candidates, vocab_size)
    top_k = torch.tensor([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params])
    top_k = top_k.to(device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([p.min_p for p in params], device=device)

    sorted_LC, order_LC = probs_LV.topk(num_candidates, dim=-1)
    is_likely_LC = sorted_LC >= min_p[:, None] * sorted_LC[:, :1]
    is_likely_LC &= torch.arange(num_candidates, device=device) < top_k[:, None]
    kept_LC = (sorted_LC * is_likely_LC).double()
    # What min-p and top-k leave is a distribution of its own, and top-p looks at that one. Its
    # total is known if they cut inside the candidates, or if they don't cut at all.
    is_cut_L = ~is_likely_LC[:, -1]
    is_uncut_L = (min_p == 0.0) & (top_k == vocab_size)
    total_L = torch.where(is_cut_L, kept_LC.sum(-1), probs_LV.sum(-1, dtype=torch.float64))
    before_LC = kept_LC.cumsum(-1) - kept_LC
    is_inside_LC = is_likely_LC & (before_LC < (top_p * total_L)[:, None])
    is_inside_LC[:, 0] = True
    choice_L = _inverse_cdf(sorted_LC * is_inside_LC, uniform_L)
    tokens_L = order_LC.gather(1, choice_L[:, None]).squeeze(1)

    if num_candidates < vocab_size:
        is_complete_L = is_cut_L | (is_uncut_L & ~is_inside_LC[:, -1])
        again = (~is_complete_L).nonzero().flatten()
        if len(again):
            filters = [params[row] for row in again.tolist()]
            tokens_L[again] = _draw_filtered(probs_LV[again], filters, uniform_L[again], vocab_size)
    return tokens_L


def _inverse_cdf(weights_LC: torch.Tensor, uniform_L: torch.Tensor) -> torch.Tensor:
    """The first column whose cumulative weight exceeds ``uniform`` times the row's total.

    Some column in any case, also where the weights are NaN.
    """
    cumulative_LC = weights_LC.cumsum(-1, dtype=torch.float64)
    target_L1 = uniform_L[:, None] * cumulative_LC[:, -1:]
    columns_L = torch.searchsorted(cumulative_LC, target_L1, right=True).squeeze(1)
    return columns_L.clamp(max=weights_LC.shape[1] - 1)


def _logprobs(
    logits_LV: torch.Tensor, token_ids: list[int], params: list[SamplingParams]
) -> dict[int, TokenLogprob]:
    """By row, for the rows that ask for them: under the model itself, before anything above."""
    rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return {}
    table = torch.log_softmax(logits_LV[torch.tensor(rows, device=logits_LV.device)].float(), dim=-1)
    chosen = torch.tensor([token_ids[row] for row in rows], device=logits_LV.device)
    chosen_values = table.gather(1, chosen[:, None]).squeeze(1).tolist()
    most = max(params[row].logprobs or 0 for row in rows)
    top_values, top_ids = (values.tolist() for values in table.topk(min(most, table.shape[1]), dim=-1))
    result = {}
    for index, row in enumerate(rows):
        count = params[row].logprobs or 0
        top = list(zip(top_ids[index][:count], top_values[index][:count], strict=True))
        result[row] = TokenLogprob(token_ids[row], chosen_values[index], top)
    return result
