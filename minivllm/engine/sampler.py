"""From logits to tokens, for the whole batch at once.

The order is: penalties and the mask of end-of-turn tokens, temperature, min-p, top-k, top-p, draw.

A draw is the Gumbel-max trick (Maddison et al. 2014): each token's score gets noise of its own, and
the largest sum wins. The noise is a hash of the request's seed, of how many tokens it has, and of
the token: nothing a request samples depends on who else is in the batch, on chunking, or on a
preemption. It is chosen over inverting the cumulative distribution because a rounding error in the
logits, which a batch of another size brings, changes a token only where two sums are that close; a
cumulative sum has thousands of edges for it to cross.

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

    tokens_L = _argmax(scores_LV)
    random_rows = [row for row, p in enumerate(params) if not p.is_greedy]
    if random_rows:
        index = torch.tensor(random_rows, device=logits_LV.device)
        keys_L2 = _noise_keys([requests[row] for row in random_rows]).to(logits_LV.device)
        scaled_LV = _scale_and_filter(scores_LV[index], [params[row] for row in random_rows])
        tokens_L[index] = _argmax(scaled_LV + _gumbel_noise(keys_L2, logits_LV.shape[1]))

    token_ids: list[int] = tokens_L.tolist()
    logprobs = _logprobs(logits_LV, token_ids, params)
    return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def _argmax(scores_LV: torch.Tensor) -> torch.Tensor:
    """Where each row is largest, and the first such place: int64 [L]. ``scores_LV`` is float32."""
    if scores_LV.device.type == "cpu":  # numpy takes a tenth of torch's time
        return torch.from_numpy(scores_LV.numpy().argmax(axis=-1))
    return scores_LV.argmax(dim=-1)


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


def _noise_keys(requests: list[Request]) -> torch.Tensor:
    """Two int32 per request, from its seed and position: SplitMix64 (Steele et al. 2014). [L, 2]"""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        seeds = np.array([request.seed for request in requests], dtype=np.int64).view(np.uint64)
        positions = np.array([request.num_output_tokens for request in requests], dtype=np.uint64)
        bits = _splitmix64(_splitmix64(seeds) + positions)
    return torch.from_numpy(bits.view(np.int32).reshape(-1, 2))


def _splitmix64(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _gumbel_noise(keys_L2: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [L, V]: the same for the same key and token, on every device."""
    low_L1, high_L1 = keys_L2[:, :1], keys_L2[:, 1:]
    bits_LV = torch.arange(vocab_size, dtype=torch.int32, device=keys_L2.device) + low_L1
    # Two rounds of MurmurHash3's finaliser (Appleby 2011), with the key's other half between them.
    bits_LV = _murmur_mix(_murmur_mix(bits_LV).bitwise_xor_(high_L1))
    uniform_LV = (bits_LV.bitwise_and_(0x7FFFFFFF).float() + 0.5) * 2.0**-31
    # An exponential variable is most precise near 0, where the largest noise comes from. Not 1: the
    # noise would be minus infinity, and the only token that is left must win with any noise.
    exponential_LV = uniform_LV.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()
    return exponential_LV.log_().neg_()


def _murmur_mix(bits: torch.Tensor) -> torch.Tensor:
    """Scramble int32, in place. Products wrap; the mask makes a signed shift an unsigned one."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1))
        bits.mul_(factor - (1 << 32) if factor >= 1 << 31 else factor)
    return bits


def _scale_and_filter(scores_LV: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Scores over temperature; minus infinity for what min-p, top-k and top-p drop.

    Every row has temperature > 0.
    """
    device = scores_LV.device
    temperature = torch.tensor([max(p.temperature, _MIN_TEMPERATURE) for p in params], device=device)
    # The largest score becomes 0 first, so that dividing by a tiny temperature can't overflow it.
    scaled_LV = (scores_LV - scores_LV.amax(dim=-1, keepdim=True)) / temperature[:, None]
    rows = [row for row, p in enumerate(params) if p.top_p < 1.0 or p.top_k > 0 or p.min_p > 0.0]
    if rows:
        index = torch.tensor(rows, device=device)
        scaled_LV[index] = _filter(scaled_LV[index], [params[row] for row in rows], _CANDIDATES)
    return scaled_LV


def _filter(scaled_LV: torch.Tensor, params: list[SamplingParams], num_candidates: int) -> torch.Tensor:
    """Keep each row's most likely tokens: min-p, then top-k, then top-p (Holtzman et al. 2020).

    ``num_candidates`` tokens are sorted. A row that may keep more than those is filtered again with
    all of them sorted: whether it is depends on that row alone.
    """
    device, vocab_size = scaled_LV.device, scaled_LV.shape[1]
    num_candidates = min(num_candidates, vocab_size)
    top_k = torch.tensor([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params])
    top_k = top_k.to(device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([p.min_p for p in params], device=device)

    probs_LV = torch.softmax(scaled_LV, dim=-1)
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
    candidates_LC = scaled_LV.gather(1, order_LC).masked_fill_(~is_inside_LC, -torch.inf)
    filtered_LV = torch.full_like(scaled_LV, -torch.inf).scatter_(1, order_LC, candidates_LC)

    if num_candidates < vocab_size:
        is_complete_L = is_cut_L | (is_uncut_L & ~is_inside_LC[:, -1])
        again = (~is_complete_L).nonzero().flatten()
        if len(again):
            filters = [params[row] for row in again.tolist()]
            filtered_LV[again] = _filter(scaled_LV[again], filters, vocab_size)
    return filtered_LV


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
