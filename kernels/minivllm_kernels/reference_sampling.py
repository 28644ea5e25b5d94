"""Sampling in plain torch: the definition that the other backends follow. See ``interface.py`` for shapes.

Nothing here waits for the device: no shape depends on a value.
"""

from __future__ import annotations

import torch


def keep_likely(
    scores_LV: torch.Tensor,
    temperature_L: torch.Tensor,
    min_p_L: torch.Tensor,
    top_k_L: torch.Tensor,
    top_p_L: torch.Tensor,
) -> torch.Tensor:
    """:meth:`KernelBackend.keep_likely`, by sorting whole rows."""
    scores_LV = _without_nan(scores_LV)
    highest_L1 = scores_LV.amax(dim=-1, keepdim=True)
    # The largest score becomes 0 first, so that dividing by a tiny temperature can't overflow it;
    # infinity minus itself is no number.
    shifted_LV = (scores_LV - highest_L1) / temperature_L[:, None]
    shifted_LV = shifted_LV.masked_fill_(scores_LV == highest_L1, 0.0)
    sorted_LV, order_LV = shifted_LV.sort(dim=-1, descending=True, stable=True)
    weights_LV = sorted_LV.exp_()  # relative to the likeliest token's
    ranks_V = torch.arange(weights_LV.shape[1], device=scores_LV.device)
    is_kept_LV = (weights_LV >= min_p_L[:, None]) & (ranks_V < top_k_L[:, None])
    # What min-p and top-k leave is a distribution of its own, and top-p looks at that one.
    mass_LV = (weights_LV * is_kept_LV).double()
    before_LV = mass_LV.cumsum(-1) - mass_LV
    target_L = top_p_L.double() * mass_LV.sum(-1)
    is_kept_LV &= (before_LV < target_L[:, None]) | (top_p_L >= 1.0)[:, None]
    is_kept_LV[:, 0] = True
    is_kept_LV |= (temperature_L == 0.0)[:, None]
    return scores_LV.masked_fill(~torch.empty_like(is_kept_LV).scatter_(1, order_LV, is_kept_LV), -torch.inf)


def draw(
    scores_LV: torch.Tensor, temperature_L: torch.Tensor | None, keys_L2: torch.Tensor | None
) -> torch.Tensor:
    """:meth:`KernelBackend.draw`, with the noise of every token written out."""
    scores_LV = _without_nan(scores_LV)
    if temperature_L is not None and keys_L2 is not None:
        scores_LV = scores_LV + gumbel_noise(keys_L2, scores_LV.shape[1]).mul_(temperature_L[:, None])
    if scores_LV.device.type == "cpu":  # numpy takes a tenth of torch's time
        return torch.from_numpy(scores_LV.numpy().argmax(axis=-1))
    return scores_LV.argmax(dim=-1)


def gumbel_noise(keys_L2: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [L, V]: a hash of key (int32) and token, the same on every device."""
    low_L1, high_L1 = keys_L2[:, :1], keys_L2[:, 1:]
    bits_LV = torch.arange(vocab_size, dtype=torch.int32, device=keys_L2.device) + low_L1
    # Two rounds of MurmurHash3's finaliser (Appleby 2011), with the key's other half between them.
    return noise_from_bits(_murmur_mix(_murmur_mix(bits_LV).bitwise_xor_(high_L1)))


def noise_from_bits(bits: torch.Tensor) -> torch.Tensor:
    """Gumbel noise from random int32, which are overwritten: -log(-log(1 - u)) of a uniform u."""
    uniform = (bits.bitwise_and_(0x7FFFFFFF).float() + 0.5) * 2.0**-31
    # An exponential variable is most precise near 0, where the largest noise comes from. Not 1: the
    # noise would be minus infinity, and the only token that is left must win with any noise.
    exponential = uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _murmur_mix(bits: torch.Tensor) -> torch.Tensor:
    """Scramble int32, in place. Products wrap; the mask makes a signed shift an unsigned one."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1))
        bits.mul_(factor - (1 << 32) if factor >= 1 << 31 else factor)
    return bits


def _without_nan(scores_LV: torch.Tensor) -> torch.Tensor:
    """As float32, NaN as minus infinity."""
    scores_LV = scores_LV.float()
    return scores_LV.masked_fill(scores_LV.isnan(), -torch.inf)
