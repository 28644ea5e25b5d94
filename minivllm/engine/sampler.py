"""From logits to tokens, for the whole batch at once.

The order is: a grammar's mask, biases, penalties and the mask of end-of-turn tokens, temperature, min-p,
top-k, top-p, draw.

A draw is the Gumbel-max trick (Maddison et al. 2014): each token's score gets noise of its own, and
the largest sum wins. The noise is a hash of the request's seed, of how many tokens it has, and of
the token: nothing a request samples depends on who else is in the batch, on chunking, or on a
preemption. It is chosen over inverting the cumulative distribution because a rounding error in the
logits, which a batch of another size brings, changes a token only where two sums are that close; a
cumulative sum has thousands of edges for it to cross.

:func:`sample` launches all of it and waits for nothing; :meth:`Sample.fetch` waits for the tokens.

Shapes: L rows (requests that get a token), V vocabulary, R rows that ask for log probabilities, C the
most likely tokens of each of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from minivllm_kernels import KernelBackend

from minivllm.engine.scheduler import SampledToken
from minivllm.engine.transfer import to_device, to_host
from minivllm.request import Request, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Which tokens may be sampled, in some rows."""

    rows: list[int]
    """R of the L rows, ascending; the others are free."""
    bits_RB: npt.NDArray[np.uint8]
    """[R, at least V / 8]: bit ``i % 8`` of byte ``i // 8`` allows token ``i``."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What :func:`sample` chose, while it may still be under way on the device."""

    tokens_L: torch.Tensor
    """int64, on the device."""
    _logprob_counts: dict[int, int]
    """By row, in order: how many of the most likely tokens a request wants to know, beside its own."""
    _copy: Callable[[], npt.NDArray[Any]]

    def fetch(self) -> list[SampledToken]:
        """The tokens, on the host: waits until the device has chosen them."""
        numbers: list[float] = self._copy().tolist()
        num_rows, num_asking = len(self.tokens_L), len(self._logprob_counts)
        token_ids = list(map(int, numbers[:num_rows]))
        sampled = [SampledToken(token_id) for token_id in token_ids]
        if num_asking:
            # As _logprobs lays them out; float64 holds token ids exactly.
            size = (len(numbers) - num_rows) // num_asking
            for index, (row, count) in enumerate(self._logprob_counts.items()):
                start = num_rows + index * size
                own, *rest = numbers[start : start + size]
                top_ids = map(int, rest[: size // 2])
                top = list(zip(top_ids, rest[size // 2 :], strict=True))[:count]
                logprob = TokenLogprob(token_ids[row], own, top)
                sampled[row] = SampledToken(token_ids[row], logprob)
        return sampled


def sample(
    logits_LV: torch.Tensor,
    requests: list[Request],
    eos_token_ids: frozenset[int],
    kernels: KernelBackend,
    mask: TokenMask | None = None,
) -> Sample:
    """Choose each request's next token.

    Args:
        logits_LV: any floating dtype; not mutated.
        requests: one for each row.
        eos_token_ids: masked while a request has fewer than ``min_tokens`` tokens.
        mask: of the rows whose tokens a grammar restricts.
    """
    params = [request.sampling for request in requests]
    scores_LV = logits_LV if mask is None else apply_token_mask(logits_LV, mask)
    if any(p.adjusts_logits for p in params):
        scores_LV = _adjust(scores_LV, requests, eos_token_ids)
    tokens_L = _draw(scores_LV, requests, kernels)

    counts = {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None}
    numbers = tokens_L
    if counts:
        numbers = torch.cat((tokens_L.double(), _logprobs(logits_LV, tokens_L, counts).flatten()))
    return Sample(tokens_L, counts, to_host(numbers))


def _draw(scores_LV: torch.Tensor, requests: list[Request], kernels: KernelBackend) -> torch.Tensor:
    """Temperature, filters, and the choice itself: int64 [L]."""
    params = [request.sampling for request in requests]
    if all(p.is_greedy for p in params):
        return kernels.draw(scores_LV)
    device, vocab_size = scores_LV.device, scores_LV.shape[1]
    temperature_L, min_p_L, top_k_L, top_p_L = to_device(
        np.array(
            [
                [p.temperature for p in params],
                [p.min_p for p in params],
                [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params],
                [p.top_p for p in params],
            ],
            dtype=np.float32,
        ),
        device,
    )
    if any(not p.is_greedy and (p.top_p < 1.0 or p.top_k > 0 or p.min_p > 0.0) for p in params):
        scores_LV = kernels.keep_likely(scores_LV, temperature_L, min_p_L, top_k_L, top_p_L)
    return kernels.draw(scores_LV, temperature_L, to_device(_noise_keys(requests), device))


def _adjust(scores_LV: torch.Tensor, requests: list[Request], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """Biases, penalties, and the mask of end-of-turn tokens."""
    scores_LV = _add_biases(scores_LV, [request.sampling for request in requests])
    penalised = [row for row, request in enumerate(requests) if request.sampling.has_penalties]
    if penalised:
        scores_LV = _penalise(scores_LV, penalised, [requests[row] for row in penalised])
    if any(request.num_output_tokens < request.sampling.min_tokens for request in requests):
        scores_LV = _mask_ends(scores_LV, requests, eos_token_ids)
    return scores_LV


def _add_biases(logits_LV: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    biases = {
        row * logits_LV.shape[1] + token_id: bias
        for row, p in enumerate(params)
        for token_id, bias in p.logit_bias.items()
    }
    if not biases:
        return logits_LV
    device = logits_LV.device
    values = to_device(np.array(list(biases.values()), dtype=np.float32), device)
    scores = logits_LV.float().flatten().index_add(0, _index(list(biases), device), values)
    return scores.view_as(logits_LV)


def apply_token_mask(logits_LV: torch.Tensor, mask: TokenMask) -> torch.Tensor:
    """The logits with -inf for tokens that ``mask`` doesn't allow; the argument isn't mutated."""
    device, vocab_size = logits_LV.device, logits_LV.shape[1]
    if device.type == "cpu":
        bits_RV = np.unpackbits(mask.bits_RB, axis=1, count=vocab_size, bitorder="little")
        allowed_RV = torch.from_numpy(bits_RV.view(np.bool_))
    else:
        allowed_RV = unpack_bits(to_device(mask.bits_RB, device))[:, :vocab_size]
    nothing = logits_LV.new_full((), -torch.inf)
    if len(mask.rows) == len(logits_LV):
        return torch.where(allowed_RV, logits_LV, nothing)
    index = _index(mask.rows, device)
    return logits_LV.index_copy(0, index, torch.where(allowed_RV, logits_LV[index], nothing))


def unpack_bits(bytes_RB: torch.Tensor) -> torch.Tensor:
    """uint8 [R, B] to bool [R, 8 B], the lowest bit of each byte first; waits for nothing."""
    places_8 = torch.arange(8, dtype=torch.uint8, device=bytes_RB.device)
    return (bytes_RB[:, :, None] >> places_8 & 1).flatten(1).bool()


def _index(values: list[int], device: torch.device) -> torch.Tensor:
    return to_device(np.array(values, dtype=np.int64), device)


def _penalise(scores_LV: torch.Tensor, rows: list[int], requests: list[Request]) -> torch.Tensor:
    """Repetition penalty (Keskar et al. 2019) on prompt and output; presence and frequency on output.

    Only the scores of tokens that occur are touched: the requests' own, in their ``rows``.
    """
    vocab_size, device = scores_LV.shape[1], scores_LV.device
    lengths = [len(request.token_ids) for request in requests]
    tokens = np.fromiter(chain.from_iterable(r.token_ids for r in requests), np.int64, count=sum(lengths))
    request_of_token = np.repeat(np.arange(len(requests)), lengths)
    # Places in the flat scores, P of them, and how often each one's token is in its request's output.
    places_P, place_of_token = np.unique(request_of_token * vocab_size + tokens, return_inverse=True)
    is_output = np.concatenate([np.arange(len(r.token_ids)) >= r.num_prompt_tokens for r in requests])
    counts_P = np.bincount(place_of_token[is_output], minlength=len(places_P))
    request_of_P = places_P // vocab_size
    repetition, presence, frequency = np.array(
        [
            (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            for p in (request.sampling for request in requests)
        ]
    ).T
    summand_P = frequency[request_of_P] * counts_P + presence[request_of_P] * (counts_P > 0)
    factor, summand = to_device(np.stack([repetition[request_of_P], summand_P]).astype(np.float32), device)
    places = to_device(np.array(rows)[request_of_P] * vocab_size + places_P % vocab_size, device)
    flat = scores_LV.float().flatten()
    before = flat[places]
    after = torch.where(before > 0, before / factor, before * factor) - summand
    return flat.index_copy(0, places, after).view_as(scores_LV)


def _mask_ends(
    scores_LV: torch.Tensor, requests: list[Request], eos_token_ids: frozenset[int]
) -> torch.Tensor:
    places = [
        row * scores_LV.shape[1] + token_id
        for row, request in enumerate(requests)
        if request.num_output_tokens < request.sampling.min_tokens and request.sampling.grammar is None
        for token_id in (*eos_token_ids, *request.sampling.stop_token_ids)
    ]
    masked = scores_LV.flatten().index_fill(0, _index(places, scores_LV.device), -torch.inf)
    return masked.view_as(scores_LV)


def _noise_keys(requests: list[Request]) -> npt.NDArray[np.int32]:
    """Two int32 per request, from its seed and position: SplitMix64 (Steele et al. 2014). [L, 2]"""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        seeds = np.array([request.seed for request in requests], dtype=np.int64).view(np.uint64)
        positions = np.array([request.num_output_tokens for request in requests], dtype=np.uint64)
        bits = _splitmix64(_splitmix64(seeds) + positions)
    return bits.view(np.int32).reshape(-1, 2)


def _splitmix64(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _logprobs(logits_LV: torch.Tensor, tokens_L: torch.Tensor, counts: dict[int, int]) -> torch.Tensor:
    """For the rows in ``counts``, under the model itself, before anything above.

    Returns:
        float64 [R, 1 + 2C]: the chosen token's log probability, the likeliest tokens' ids, and theirs.
    """
    rows = _index(list(counts), logits_LV.device)
    table_RV = torch.log_softmax(logits_LV[rows].float(), dim=-1)
    chosen_R1 = table_RV.gather(1, tokens_L[rows][:, None])
    top_RC, top_ids_RC = table_RV.topk(min(max(counts.values()), table_RV.shape[1]), dim=-1)
    return torch.cat((chosen_R1.double(), top_ids_RC.double(), top_RC.double()), dim=1)
