"""Sampling in Triton. Shapes as in ``interface.py``; L rows, V vocabulary.

Nothing is copied to the host and grids follow from shapes alone.

- :func:`draw`: rows are split into stretches, one program each; a second kernel compares their winners.
  Which is the first of the largest doesn't depend on the number of stretches.
- :func:`keep_likely`: one program per row finds the score at which top-k and top-p cut by bisection. Floats
  have the order of their bits, so 31 halvings of an interval of integers single out any one score. Sorting
  a row would do far more: what order the others have is nobody's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _murmur_mix(bits):
    """MurmurHash3's finaliser (Appleby 2011) of uint32."""
    bits ^= bits >> 16
    bits *= 0x85EBCA6B
    bits ^= bits >> 13
    bits *= 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _log(x):
    """Natural logarithm of normal x > 0 within 1 ulp: the polynomial of Cephes' logf (Moshier).

    ``tl.log`` has an absolute error near 1, where this one's is relative to log(x).
    """
    bits = x.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23  # so that what is left is in [sqrt(1/2), sqrt(2))
    f = (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0
    scale = power.to(tl.float32)
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    tail = p * f * square - 2.12194440e-4 * scale - 0.5 * square
    return f + tail + 0.693359375 * scale


@triton.jit
def _gumbel_noise(tokens, low, high):
    """Standard Gumbel noise: a hash of the key (low, high) and the tokens. int32 → float32."""
    bits = _murmur_mix((tokens + low).to(tl.uint32, bitcast=True))
    bits = _murmur_mix(bits ^ high.to(tl.uint32, bitcast=True))
    u = ((bits & 0x7FFFFFFF).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    u = tl.minimum(u, 0.999999940395355)  # 1 - 2^-24: not 1, whose noise is minus infinity
    # -log(1 - u), with what rounding 1 - u took away.
    rest = 1.0 - u
    lost = (rest - 1.0) + u
    return -_log(lost / rest - _log(rest))


@triton.jit
def draw_kernel(
    scores,
    temperatures,
    keys,
    best_scores,
    best_tokens,
    row_stride,
    VOCAB: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_GREEDY: tl.constexpr,
):
    """Program (row, stretch): the stretch's largest noisy score, and the first token that has it."""
    row, stretch = tl.program_id(0), tl.program_id(1)
    scores += row.to(tl.int64) * row_stride
    if not IS_GREEDY:
        temperature = tl.load(temperatures + row)
        low, high = tl.load(keys + row * 2), tl.load(keys + row * 2 + 1)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32)
    for start in range(0, STRETCH, BLOCK):
        tokens = stretch * STRETCH + start + tl.arange(0, BLOCK)
        noisy = tl.load(scores + tokens, mask=tokens < VOCAB, other=float("-inf")).to(tl.float32)
        if not IS_GREEDY:  # noqa: SIM102  # known to the compiler, unlike what follows
            if temperature > 0.0:
                noisy += temperature * _gumbel_noise(tokens, low, high)
        is_better = noisy > best  # NaN never is
        best = tl.where(is_better, noisy, best)
        best_token = tl.where(is_better, tokens, best_token)
    highest = tl.max(best, 0)
    place = row * tl.num_programs(1) + stretch
    tl.store(best_scores + place, highest)
    tl.store(best_tokens + place, tl.min(tl.where(best == highest, best_token, VOCAB), 0))


@triton.jit
def pick_kernel(best_scores, best_tokens, tokens, STRETCHES: tl.constexpr):
    """Program (row): the best of its stretches, a power of two."""
    row = tl.program_id(0)
    places = row * STRETCHES + tl.arange(0, STRETCHES)
    best = tl.load(best_scores + places)
    best_token = tl.load(best_tokens + places)
    first = tl.min(tl.where(best == tl.max(best, 0), best_token, 0x7FFFFFFF), 0)
    tl.store(tokens + row, first.to(tl.int64))


@triton.jit
def _shifted(scores, tokens, highest, temperature, VOCAB: tl.constexpr):
    """Scores under the row's largest, over temperature: at most 0. NaN and past the end: minus infinity."""
    values = tl.load(scores + tokens, mask=tokens < VOCAB, other=float("-inf")).to(tl.float32)
    # Infinity minus itself is no number.
    shifted = tl.where(values == highest, 0.0, (values - highest) / temperature)
    return tl.where(values == values, shifted, float("-inf"))


@triton.jit
def _order(x):
    """int32 with the order of float32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _count_and_mass(
    scores, highest, temperature, min_p, edge, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many tokens min-p leaves with an order of at least ``edge``, and the sum of their weights."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        shifted = _shifted(scores, tokens, highest, temperature, VOCAB)
        weights = tl.exp(shifted)
        is_above = (_order(shifted) >= edge) & (weights >= min_p) & (tokens < VOCAB)
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, weights, 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def keep_likely_kernel(
    scores,
    temperatures,
    min_ps,
    top_ks,
    top_ps,
    kept,
    row_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row). The result of each search is an interval of orders, [low, high): all above it is in,
    of the tokens in it the first ``num_inside``. They are equal, or there is only one.
    """
    row = tl.program_id(0)
    scores += row.to(tl.int64) * row_stride
    kept += row.to(tl.int64) * VOCAB
    temperature, min_p = tl.load(temperatures + row), tl.load(min_ps + row)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    min_p = tl.where(temperature > 0.0, min_p, 0.0)
    # All that min-p leaves: from the order of minus infinity.
    low, high = -2139095041, -2139095041
    num_inside = VOCAB
    highest = float("-inf")
    if (temperature > 0.0) & ((min_p > 0.0) | (top_k < VOCAB) | (top_p < 1.0)):
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, VOCAB, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            values = tl.load(scores + tokens, mask=tokens < VOCAB, other=float("-inf")).to(tl.float32)
            largest = tl.where(values > largest, values, largest)
        highest = tl.max(largest, 0)
        count_low, mass_low = _count_and_mass(scores, highest, temperature, min_p, low, VOCAB, BLOCK)
        total = mass_low
        if count_low > top_k:
            high, count_high, mass_high = 1, 0, 0.0
            while (high - low > 1) & (count_low - count_high > 1):
                middle = low + (high - low) // 2
                count, mass = _count_and_mass(scores, highest, temperature, min_p, middle, VOCAB, BLOCK)
                if count >= top_k:
                    low, count_low, mass_low = middle, count, mass
                else:
                    high, count_high, mass_high = middle, count, mass
            num_inside = (top_k - count_high).to(tl.int32)
            total = mass_high + (mass_low - mass_high) / (count_low - count_high) * num_inside
        if top_p < 1.0:
            # Above 0, so that the likeliest token is in however small top_p is.
            target = tl.maximum(top_p * total, 1e-30)
            low_of_top_k, most_inside = low, num_inside
            high, count_high, mass_high = 1, 0, 0.0
            while (high - low > 1) & (count_low - count_high > 1):
                middle = low + (high - low) // 2
                count, mass = _count_and_mass(scores, highest, temperature, min_p, middle, VOCAB, BLOCK)
                if mass >= target:
                    low, count_low, mass_low = middle, count, mass
                else:
                    high, count_high, mass_high = middle, count, mass
            weight = (mass_low - mass_high) / (count_low - count_high)
            num_inside = tl.minimum(tl.maximum(tl.ceil((target - mass_high) / weight), 1.0), VOCAB).to(
                tl.int32
            )
            if low == low_of_top_k:  # both cut here
                num_inside = tl.minimum(num_inside, most_inside)
    num_seen = 0
    for start in range(0, VOCAB, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        shifted = _shifted(scores, tokens, highest, temperature, VOCAB)
        order = _order(shifted)
        is_left = tl.exp(shifted) >= min_p
        is_inside = is_left & (order >= low) & (order < high)
        ranks = num_seen + tl.cumsum(is_inside.to(tl.int32), 0)
        num_seen += tl.sum(is_inside.to(tl.int32), 0)
        is_kept = is_left & ((order >= high) | (is_inside & (ranks <= num_inside)))
        values = tl.load(scores + tokens, mask=tokens < VOCAB, other=float("-inf")).to(tl.float32)
        is_kept &= values == values
        tl.store(kept + tokens, tl.where(is_kept, values, float("-inf")), mask=tokens < VOCAB)


@dataclass(frozen=True, slots=True)
class DrawLaunch:
    """How :func:`draw` shares out rows of a vocabulary."""

    num_stretches: int
    """Of a row, one program each; a power of two."""
    stretch: int
    """Tokens in each, a multiple of ``block``."""
    block: int
    num_warps: int = 4


def choose_draw_launch(num_rows: int, vocab_size: int) -> DrawLaunch:
    """Enough programs for any card, each with enough tokens to be worth it."""
    block = min(1024, triton.next_power_of_2(vocab_size))
    most = min(1024 // max(num_rows, 1), vocab_size // (2 * block), 64)
    num_stretches = 1 << (max(most, 1).bit_length() - 1)
    return DrawLaunch(num_stretches, triton.cdiv(vocab_size, num_stretches * block) * block, block)


@dataclass(frozen=True, slots=True)
class KeepLaunch:
    """How a program of :func:`keep_likely` walks over its row."""

    block: int
    num_warps: int = 16


def choose_keep_launch(vocab_size: int) -> KeepLaunch:
    """A row is read some thirty times from the cache: many loads at once."""
    return KeepLaunch(min(8192, triton.next_power_of_2(vocab_size)))


def draw(
    scores_LV: torch.Tensor, temperature_L: torch.Tensor | None, keys_L2: torch.Tensor | None
) -> torch.Tensor:
    """:meth:`KernelBackend.draw`."""
    scores_LV = _with_contiguous_rows(scores_LV)
    num_rows, vocab_size = scores_LV.shape
    launch = choose_draw_launch(num_rows, vocab_size)
    shape, device = (num_rows, launch.num_stretches), scores_LV.device
    tokens_L = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return tokens_L
    best_scores = torch.empty(shape, dtype=torch.float32, device=device)
    best_tokens = torch.empty(shape, dtype=torch.int32, device=device)
    draw_kernel[shape](
        scores_LV,
        temperature_L,
        None if keys_L2 is None else keys_L2.contiguous(),
        best_scores,
        best_tokens,
        scores_LV.stride(0),
        VOCAB=vocab_size,
        STRETCH=launch.stretch,
        BLOCK=launch.block,
        IS_GREEDY=temperature_L is None,
        num_warps=launch.num_warps,
    )
    pick_kernel[num_rows,](best_scores, best_tokens, tokens_L, STRETCHES=launch.num_stretches, num_warps=1)
    return tokens_L


def keep_likely(
    scores_LV: torch.Tensor,
    temperature_L: torch.Tensor,
    min_p_L: torch.Tensor,
    top_k_L: torch.Tensor,
    top_p_L: torch.Tensor,
) -> torch.Tensor:
    """:meth:`KernelBackend.keep_likely`."""
    scores_LV = _with_contiguous_rows(scores_LV)
    num_rows, vocab_size = scores_LV.shape
    kept_LV = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=scores_LV.device)
    if num_rows == 0:
        return kept_LV
    launch = choose_keep_launch(vocab_size)
    keep_likely_kernel[num_rows,](
        scores_LV,
        temperature_L,
        min_p_L,
        top_k_L,
        top_p_L,
        kept_LV,
        scores_LV.stride(0),
        VOCAB=vocab_size,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return kept_LV


def _with_contiguous_rows(scores_LV: torch.Tensor) -> torch.Tensor:
    return scores_LV if scores_LV.stride(1) == 1 else scores_LV.contiguous()
