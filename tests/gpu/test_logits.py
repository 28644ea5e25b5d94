"""Logits at every position, at most twice as far from float32's as transformers' in the same dtype."""

from __future__ import annotations

import numpy as np
import torch

from tests.gpu.conftest import Case
from tests.gpu.oracle import ERROR_FACTOR
from tests.models.test_llama import PagedModel


def random_prompts(rng: np.random.Generator, vocab_size: int) -> list[list[int]]:
    lengths = [1, 15, 16, 17, *rng.integers(20, 300, 3).tolist()]
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def check(case: Case, paged: PagedModel) -> None:
    """The Euclidean error over all sequences, and that of the worst position."""
    ours, theirs = [], []
    for request, logits in zip(paged.requests, paged.logits, strict=True):
        assert request.num_uncomputed_tokens == 0
        exact = case.oracle.logits(request.token_ids)
        size = exact.norm(dim=-1)
        ours.append((logits.float() - exact).norm(dim=-1) / size)
        theirs.append((case.oracle.logits(request.token_ids, exactly=False) - exact).norm(dim=-1) / size)
    error, allowed = torch.cat(ours), torch.cat(theirs)
    assert not error.isnan().any()
    mean, mean_allowed = float(error.square().mean().sqrt()), float(allowed.square().mean().sqrt())
    assert mean <= ERROR_FACTOR * mean_allowed, f"error {mean:.2e}, transformers' is {mean_allowed:.2e}"
    assert error.max() <= 2 * ERROR_FACTOR * allowed.max(), (
        f"worst {error.max():.2e}, theirs {allowed.max():.2e}"
    )


def test_prefilled_whole(case: Case, rng: np.random.Generator) -> None:
    prompts = random_prompts(rng, case.model.config.vocab_size)
    paged = PagedModel(case.model, prompts)
    paged.step([len(prompt) for prompt in prompts])
    check(case, paged)


def test_prefilled_in_chunks_of_any_size(case: Case, rng: np.random.Generator) -> None:
    paged = PagedModel(case.model, random_prompts(rng, case.model.config.vocab_size))
    while any(remaining := [request.num_uncomputed_tokens for request in paged.requests]):
        paged.step([min(left, int(rng.integers(1, 100))) for left in remaining])
    check(case, paged)


def test_prefilled_in_part_and_decoded_from_there(case: Case, rng: np.random.Generator) -> None:
    """Sequences begin at different steps: prefills, decodes and both together."""
    paged = PagedModel(case.model, random_prompts(rng, case.model.config.vocab_size))
    starts = rng.integers(0, 10, len(paged.requests)).tolist()
    step = 0
    while any(remaining := [request.num_uncomputed_tokens for request in paged.requests]):
        counts = []
        for request, start, left in zip(paged.requests, starts, remaining, strict=True):
            if step < start:
                counts.append(0)
            elif request.num_computed_tokens == 0:
                counts.append(max(left - int(rng.integers(0, 20)), 1))
            else:
                counts.append(min(left, 1))
        if any(counts):
            paged.step(counts)
        step += 1
    check(case, paged)
