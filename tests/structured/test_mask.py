"""The mask on the logits, against a loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from minivllm_kernels import get_backend

from minivllm.engine.sampler import TokenMask, apply_token_mask, sample, unpack_bits
from minivllm.request import Request, SamplingParams

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 7, 31, 32, 33, 300, 1000])
@pytest.mark.parametrize("rows", [[0], [1, 3], [0, 1, 2, 3]])
def test_mask_against_a_loop(device: str, dtype: torch.dtype, vocab_size: int, rows: list[int]) -> None:
    rng = np.random.default_rng(vocab_size)
    logits_LV = torch.from_numpy(rng.standard_normal((4, vocab_size))).to(device, dtype)
    before = logits_LV.clone()
    bits_RB = rng.integers(0, 256, (len(rows), (vocab_size + 31) // 32 * 4), dtype=np.uint8)
    masked_LV = apply_token_mask(logits_LV, TokenMask(rows, bits_RB))
    expected_LV = before.clone()
    for place, row in enumerate(rows):
        for token_id in range(vocab_size):
            if not bits_RB[place, token_id // 8] >> (token_id % 8) & 1:
                expected_LV[row, token_id] = -torch.inf
    assert torch.equal(masked_LV, expected_LV)
    assert torch.equal(logits_LV, before)
    assert masked_LV.dtype == dtype


@pytest.mark.parametrize("device", DEVICES)
def test_unpacked_bits(device: str) -> None:
    """As the device does it, where there is no numpy."""
    bytes_RB = np.arange(256, dtype=np.uint8).reshape(4, 64)
    expected = np.unpackbits(bytes_RB, axis=1, bitorder="little").astype(bool)
    assert np.array_equal(unpack_bits(torch.from_numpy(bytes_RB).to(device)).cpu().numpy(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_only_allowed_tokens_are_sampled(device: str, temperature: float) -> None:
    """Whatever biases, penalties and filters say; and rows without a grammar are as they were."""
    torch.manual_seed(0)
    vocab_size, allowed = 500, {3, 77, 499}
    bits_RB = np.zeros((1, 64), dtype=np.uint8)
    for token_id in allowed:
        bits_RB[0, token_id // 8] |= 1 << token_id % 8
    params = SamplingParams(
        temperature=temperature, top_k=5, top_p=0.9, presence_penalty=1.0, logit_bias={4: 100.0}
    )
    backend = get_backend("reference")
    for seed in range(20):
        logits_LV = torch.randn(2, vocab_size, device=device)
        requests = [
            Request("free", [1], params, seed, max_total_tokens=9),
            Request("held", [1], params, seed, max_total_tokens=9),
        ]
        free = sample(logits_LV, requests, frozenset(), backend).fetch()
        held = sample(logits_LV, requests, frozenset(), backend, TokenMask([1], bits_RB)).fetch()
        assert held[0] == free[0]
        assert held[1].token_id in allowed
