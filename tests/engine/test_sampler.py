"""The sampler against independent oracles: float64 brute force, and transformers' logits processors.

All random numbers here are fixed, so that a statistical check either always passes or never does.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minivllm_kernels import get_backend
from minivllm_kernels.reference_sampling import gumbel_noise

from minivllm.engine import sampler
from minivllm.engine.scheduler import SampledToken
from minivllm.request import Request, SamplingParams
from tests.conftest import run_all

from .conftest import MakeEngine

EOS = frozenset({3, 5})
KERNELS = get_backend()


def make_request(
    *, seed: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> Request:
    return make_requests([seed], prompt=prompt, output=output, **params)[0]


def make_requests(
    seeds: Iterable[int], *, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> list[Request]:
    sampling = SamplingParams(**{"max_tokens": None, **params})
    requests = [Request("r", prompt or [1], sampling, seed=s, max_total_tokens=10_000) for s in seeds]
    for request in requests:
        request.token_ids += output or []
    return requests


def sample(
    logits: torch.Tensor, requests: list[Request], eos: frozenset[int] = frozenset()
) -> list[SampledToken]:
    return sampler.sample(logits, requests, eos, KERNELS).fetch()


def sample_ids(logits: torch.Tensor, requests: list[Request], eos: frozenset[int] = frozenset()) -> list[int]:
    return [token.token_id for token in sample(logits, requests, eos)]


def draw_many(logits_V: torch.Tensor, count: int, **params: Any) -> list[int]:
    """``count`` independent draws from one row of logits, by as many seeds."""
    return sample_ids(logits_V.expand(count, -1), make_requests(range(count), **params))


def brute_force(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Token → probability, straight from the definitions, one token at a time in Python floats."""
    highest = max(logits)
    weights = [math.exp((logit - highest) / params.temperature) for logit in logits]
    total = sum(weights)
    probs = {token: weight / total for token, weight in enumerate(weights)}
    most_likely = max(probs.values())
    probs = {token: p for token, p in probs.items() if p >= params.min_p * most_likely}
    ranked = sorted(probs, key=lambda token: -probs[token])
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total = sum(probs[token] for token in ranked)
    kept: list[int] = []
    mass = 0.0
    for token in ranked:
        kept.append(token)
        mass += probs[token]
        if mass >= params.top_p * total:
            break
    return {token: probs[token] / mass for token in kept}


def assert_frequencies(drawn: list[int], expected: dict[int, float]) -> None:
    """Pearson's chi-square, by its normal approximation; tokens with few expected draws are pooled."""
    counts = Counter(drawn)
    assert set(counts) <= set(expected), "drew a token that must be cut off"
    cells: list[tuple[float, float]] = []
    rest_seen = rest_expected = 0.0
    for token, probability in expected.items():
        if probability * len(drawn) >= 10:
            cells.append((counts[token], probability * len(drawn)))
        else:
            rest_seen, rest_expected = rest_seen + counts[token], rest_expected + probability * len(drawn)
    if rest_expected >= 10:
        cells.append((rest_seen, rest_expected))
    chi_square = sum((seen - want) ** 2 / want for seen, want in cells)
    freedom = max(len(cells) - 1, 1)
    # Wilson and Hilferty 1931: the cube root is close to normal. 4 standard deviations: 1 in 30,000.
    score = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert score < 4, f"chi-square {chi_square:.1f} with {freedom} degrees of freedom"


def random_logits(vocab_size: int, *, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.0, scale, vocab_size)).float()


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_k": -1},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"min_p": 0.5},
    {"min_p": 0.3, "top_k": 5, "top_p": 0.6, "temperature": 1.5},
    {"min_p": 0.1, "top_k": 20},
    {"min_p": 0.1, "top_p": 0.7},
    {"top_k": 10, "top_p": 0.5, "temperature": 0.8},
    {"top_k": 2000, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_support_and_frequencies_are_those_of_brute_force(params: dict[str, Any]) -> None:
    logits = random_logits(30, seed=1)
    expected = brute_force(logits.tolist(), SamplingParams(**params))
    drawn = draw_many(logits, 10_000, **params)
    assert_frequencies(drawn, expected)
    # Each token of the support has an expected count of at least 10, but for temperature 0.5's tail.
    often = {token for token, probability in expected.items() if probability > 1e-3}
    assert often <= set(drawn) <= set(expected)


LARGE_FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.99},  # more than 1,024 tokens
    {"top_p": 0.999999},
    {"top_p": 0.1},  # fewer
    {"top_k": 1023},
    {"top_k": 1024},
    {"top_k": 1025},
    {"top_k": 2500},
    {"top_k": 2999},
    {"min_p": 1e-3},
    {"min_p": 0.02, "top_p": 0.95},
    {"min_p": 1e-6, "top_k": 4000, "top_p": 0.5},
    {"top_k": 2000, "top_p": 0.9},
    # Flat: top-p's 30 % of what top-k leaves are inside the fast path, 30 % of everything would be, too.
    {"temperature": 10.0, "top_k": 1500, "top_p": 0.3},
    {"temperature": 10.0, "min_p": 0.95, "top_p": 0.3},
]


@pytest.mark.parametrize("params", LARGE_FILTERS, ids=str)
def test_large_vocabularies(params: dict[str, Any]) -> None:
    logits = random_logits(3000, seed=2)
    expected = brute_force(logits.tolist(), SamplingParams(**params))
    drawn: list[int] = []
    for start in range(0, 800, 400):
        requests = make_requests(range(start, start + 400), **params)
        drawn += sample_ids(logits.expand(400, -1), requests)
    # Pool tokens of neighbouring rank into about 20 cells of equal probability.
    ranked = sorted(expected, key=lambda token: -expected[token])
    mass = list(itertools.accumulate(expected[token] for token in ranked))
    cell_of = {token: int(20 * min(m, 1 - 1e-9)) for token, m in zip(ranked, mass, strict=True)}
    cells: dict[int, float] = {}
    for token in ranked:
        cells[cell_of[token]] = cells.get(cell_of[token], 0.0) + expected[token]
    assert set(drawn) <= set(expected), "drew a token that must be cut off"
    assert_frequencies([cell_of[token] for token in drawn], cells)


@pytest.mark.parametrize("vocab_size", [30, 1024, 1025, 4000])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 3},
        {"top_k": 1024},
        {"top_k": 1025},
        {"top_p": 0.3},
        {"top_p": 0.97},
        {"min_p": 0.05},
        {"min_p": 1e-4, "top_p": 0.9},
        {"min_p": 0.001, "top_k": 1500, "top_p": 0.95},
    ],
    ids=str,
)
def test_the_support(params: dict[str, Any], vocab_size: int) -> None:
    """What stays in after the filters."""
    logits = random_logits(vocab_size, seed=vocab_size)
    expected = brute_force(logits.tolist(), SamplingParams(**params))
    p = SamplingParams(**params)
    settings = torch.tensor([[1.0], [p.min_p], [p.top_k or vocab_size], [p.top_p]])
    filtered = KERNELS.keep_likely(logits[None], *settings)[0]
    support = set(torch.isfinite(filtered).nonzero().flatten().tolist())
    # float32 probabilities may move top_p's cut by a token where thousands are near it.
    supports = [set(expected)]
    if params.get("top_p", 1.0) < 1.0:
        looser, tighter = (
            brute_force(
                logits.tolist(), SamplingParams(**{**params, "top_p": min(1.0, params["top_p"] + nudge)})
            )
            for nudge in (1e-6, -1e-6)
        )
        assert len(looser) - len(tighter) <= 2
        supports += [set(looser), set(tighter)]
    assert support in supports


@pytest.mark.parametrize(("vocab_size", "top_p", "num_kept"), [(4, 0.5, 2), (8, 0.25, 2), (16, 0.75, 12)])
def test_top_p_stops_where_the_mass_is_reached_exactly(vocab_size: int, top_p: float, num_kept: int) -> None:
    assert len(set(draw_many(torch.zeros(vocab_size), 1000, top_p=top_p))) == num_kept


def test_the_noise_is_gumbel_s() -> None:
    """Its distribution over many tokens of many keys; Kolmogorov-Smirnov, with fixed seeds."""
    keys = sampler._noise_keys([make_request(seed=seed) for seed in range(20)])
    noise = gumbel_noise(torch.from_numpy(keys), 50_000)
    for values in (noise.flatten(), noise[0], noise[:, 0].repeat(1), noise[:, 49_999]):
        ordered = values.double().sort().values
        exact = torch.exp(-torch.exp(-ordered))
        count = len(ordered)
        distance = (exact - (torch.arange(count) + 0.5) / count).abs().max()
        assert distance * count**0.5 < 1.95  # the 0.001 level
    correlations = torch.corrcoef(noise) - torch.eye(20)
    assert correlations.abs().max() < 5 / 50_000**0.5
    shifted = torch.corrcoef(torch.stack([noise[0, :-1], noise[0, 1:]]))[0, 1]
    assert abs(shifted) < 4 / 50_000**0.5


def test_a_rounding_error_in_the_logits_hardly_ever_matters() -> None:
    """Batches of other sizes round differently; a request's tokens must not notice."""
    logits = random_logits(30_000, seed=1).expand(300, -1)
    requests = [make_request(seed=seed) for seed in range(300)]
    error = torch.from_numpy(np.random.default_rng(0).normal(0, 1e-6, logits.shape)).float()
    assert sample_ids(logits, requests) == sample_ids(logits + error, requests)


# transformers as the oracle


def hf_support(processor: Any, logits: torch.Tensor, token_ids: list[int]) -> set[int]:
    scores = processor(torch.tensor([token_ids]), logits[None].clone())
    return set(torch.isfinite(scores[0]).nonzero().flatten().tolist())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("value", [1, 2, 17, 39, 40, 100])
def test_top_k_keeps_what_transformers_keeps(value: int, seed: int) -> None:
    from transformers import TopKLogitsWarper

    logits = random_logits(40, seed=seed, scale=0.7)
    assert set(draw_many(logits, 5000, top_k=value)) == hf_support(TopKLogitsWarper(value), logits, [0])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("value", [0.01, 0.2, 0.5, 0.8, 0.95])
def test_top_p_keeps_what_transformers_keeps(value: float, seed: int) -> None:
    from transformers import TopPLogitsWarper

    logits = random_logits(40, seed=seed, scale=0.7)
    assert set(draw_many(logits, 5000, top_p=value)) == hf_support(TopPLogitsWarper(value), logits, [0])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("value", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_min_p_keeps_what_transformers_keeps(value: float, seed: int) -> None:
    from transformers import MinPLogitsWarper

    logits = random_logits(40, seed=seed, scale=0.7)
    assert set(draw_many(logits, 5000, min_p=value)) == hf_support(MinPLogitsWarper(value), logits, [0])


@pytest.mark.parametrize("value", [0.3, 0.9, 1.1, 2.0, 10.0])
def test_repetition_penalty_is_that_of_transformers(value: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    generator = np.random.default_rng(7)
    logits = torch.from_numpy(generator.normal(0, 2, (64, 50))).float()
    requests, expected = [], []
    for row in range(64):
        tokens = generator.integers(0, 50, 25).tolist()  # repeats count once
        requests.append(
            make_request(prompt=tokens[:10], output=tokens[10:], repetition_penalty=value, temperature=0)
        )
        processor = RepetitionPenaltyLogitsProcessor(value)
        expected.append(int(processor(torch.tensor([tokens]), logits[row : row + 1]).argmax()))
    assert sample_ids(logits, requests) == expected
    assert expected != logits.argmax(-1).tolist()  # the penalty does something


def penalised(logits: list[float], request: Request) -> list[float]:
    """OpenAI's definition of the presence and frequency penalties, after the repetition penalty."""
    p = request.sampling
    output = request.token_ids[request.num_prompt_tokens :]
    scores = list(logits)
    for token in set(request.token_ids):
        factor = p.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(output):
        scores[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    return scores


@pytest.mark.parametrize("seed", range(6))
def test_presence_and_frequency_count_the_output_only(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(0, 1, (40, 12))).float()
    requests = [
        make_request(
            prompt=generator.integers(0, 12, 6).tolist(),
            output=generator.integers(0, 12, int(generator.integers(0, 20))).tolist(),
            presence_penalty=float(generator.uniform(-2, 2)),
            frequency_penalty=float(generator.uniform(-2, 2)),
            repetition_penalty=float(generator.choice([1.0, 1.3])),
            temperature=0,
        )
        for _ in range(40)
    ]
    expected = [int(np.argmax(penalised(row.tolist(), r))) for row, r in zip(logits, requests, strict=True)]
    assert sample_ids(logits, requests) == expected


def test_penalties_change_the_distribution_of_random_draws() -> None:
    logits = random_logits(12, seed=3)
    params = {"presence_penalty": 1.2, "frequency_penalty": -0.3, "repetition_penalty": 1.5}
    prompt, output = [1, 2], [2, 4, 4, 4]
    requests = make_requests(range(10_000), prompt=prompt, output=output, **params)
    drawn = sample_ids(logits.expand(len(requests), -1), requests)
    assert_frequencies(drawn, brute_force(penalised(logits.tolist(), requests[0]), SamplingParams()))


# Seeds


def test_a_seed_repeats_and_another_differs() -> None:
    logits = random_logits(1000, seed=0).expand(50, -1)
    first, again, other = (
        sample_ids(logits, [make_request(seed=base + number) for number in range(50)]) for base in (0, 0, 50)
    )
    assert first == again != other
    assert len(set(first)) > 30


def test_an_engine_s_seed_repeats_and_another_differs(make_tiny_engine: MakeEngine) -> None:
    """For requests without a seed of their own."""
    sampling = SamplingParams(max_tokens=10, temperature=1.0, ignore_eos=True)
    first, again, other = (
        run_all(make_tiny_engine(seed=seed), [[5, 6, 7]] * 3, sampling) for seed in (3, 3, 4)
    )
    assert first == again != other
    assert len(set(map(tuple, first))) == 3


def test_each_token_of_a_request_has_its_own_number() -> None:
    """One seed along its positions is as random as many seeds at one position."""
    logits = random_logits(30, seed=1)
    requests = [make_request(seed=42, output=[0] * number) for number in range(5000)]
    drawn = sample_ids(logits.expand(5000, -1), requests)
    assert_frequencies(drawn, brute_force(logits.tolist(), SamplingParams()))
    # Neighbouring draws are independent: pairs have the product distribution.
    probs = brute_force(logits.tolist(), SamplingParams())
    pairs = [a * 30 + b for a, b in itertools.pairwise(drawn)]
    assert_frequencies(pairs, {a * 30 + b: probs[a] * probs[b] for a in probs for b in probs})


def test_neighbouring_seeds_are_not_one_stream_shifted() -> None:
    """The completions of one prompt have seeds in a row."""
    logits = random_logits(1000, seed=1).expand(200, -1)
    for shift in (-1, 1):
        first = sample_ids(logits, [make_request(seed=7, output=[0] * n) for n in range(1, 201)])
        second = sample_ids(logits, [make_request(seed=8, output=[0] * (n + shift)) for n in range(1, 201)])
        assert sum(a == b for a, b in zip(first, second, strict=True)) < 20


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_extreme_seeds(seed: int) -> None:
    logits = random_logits(30, seed=1)
    requests = [make_request(seed=seed, output=[0] * number) for number in range(3000)]
    drawn = sample_ids(logits.expand(3000, -1), requests)
    assert_frequencies(drawn, brute_force(logits.tolist(), SamplingParams()))


def test_prompt_length_does_not_shift_the_stream() -> None:
    logits = random_logits(1000, seed=1).expand(2, -1)
    first, second = sample_ids(logits, [make_request(prompt=[1]), make_request(prompt=[1] * 9)])
    assert first == second


# Who else is in the batch


@st.composite
def any_request(draw: st.DrawFn, vocab_size: int) -> Request:
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=6)
    return make_request(
        seed=draw(st.integers(0, 1000)),
        prompt=draw(tokens),
        output=draw(tokens),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.7, 1e-30])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 1024, 1500])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.3, 0.9, 0.99999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.2, 1e-5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.4])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.4])),
        min_tokens=draw(st.sampled_from([0, 0, 4])),
        stop_token_ids=draw(st.sampled_from([(), (2, 4)])),
        logprobs=draw(st.sampled_from([None, None, 0, 3])),
    )


@settings(max_examples=80)
@given(data=st.data(), vocab_size=st.sampled_from([8, 40, 1500, 3000]), seed=st.integers(0, 2**32))
def test_a_row_does_not_depend_on_the_others(data: st.DataObject, vocab_size: int, seed: int) -> None:
    """Alone, among others, in any order: the same token, and the same log probabilities to the bit."""
    requests = data.draw(st.lists(any_request(vocab_size), min_size=2, max_size=6))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    # bfloat16 logits have many ties, and it must not depend on the batch how they are broken.
    rows = np.random.default_rng(seed).normal(0, 1.5, (len(requests), vocab_size))
    logits = torch.from_numpy(rows).to(dtype)
    before = logits.clone()
    together = sample(logits, requests, EOS)
    assert torch.equal(logits, before), "logits were mutated"
    order = data.draw(st.permutations(range(len(requests))))
    permuted = sample(logits[order], [requests[row] for row in order], EOS)
    for index, row in enumerate(order):
        alone = sample(logits[row : row + 1], [requests[row]], EOS)
        assert alone == [together[row]]
        assert permuted[index] == together[row]


def test_ties_are_broken_alike_whatever_else_is_sampled() -> None:
    """A neighbour that needs a longer sorted list must not reorder equal probabilities of this row."""
    logits = (random_logits(5000, seed=0) * 4).round() / 4
    neighbour = make_request(seed=1, top_p=0.99999)
    for seed in range(40):
        request = make_request(seed=seed, top_p=0.3)
        alone = sample_ids(logits[None], [request])
        assert sample_ids(logits.expand(2, -1), [request, neighbour])[:1] == alone


def test_greedy_rows_are_untouched_by_the_parameters_of_others() -> None:
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(0, 1, (60, 200))).float()
    others: list[dict[str, Any]] = [
        {"top_k": 3},
        {"repetition_penalty": 5.0, "presence_penalty": 2.0, "temperature": 0},
        {"min_tokens": 9, "stop_token_ids": tuple(range(150))},
        {"temperature": 50.0, "min_p": 0.9},
    ]
    requests = [
        make_request(seed=row, temperature=0, prompt=list(range(100)), output=list(range(100, 105)))
        if row % 2
        else make_request(seed=row, prompt=list(range(100)), output=[1], **others[row // 2 % 4])
        for row in range(60)
    ]
    drawn = sample_ids(logits, requests, EOS)
    assert drawn[1::2] == logits.argmax(-1).tolist()[1::2]


# Extreme values


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(200, seed=4).sort(descending=True).values
    logits[1] = logits[0] - 0.5
    assert set(draw_many(logits, 500, temperature=temperature)) == {0}


def test_a_tiny_temperature_sees_the_smallest_difference() -> None:
    logits = torch.zeros(100)
    logits[40] = 8.0
    logits[41] = torch.nextafter(logits[40], torch.tensor(torch.inf))
    assert set(draw_many(logits, 500, temperature=1e-30)) == {41}
    assert set(draw_many(logits, 500, temperature=1e-30, top_p=0.9, top_k=50)) == {41}


def test_a_tiny_temperature_with_huge_logits() -> None:
    logits = torch.tensor([-3e38, 1e38, 3e38, 0.0])
    assert set(draw_many(logits, 100, temperature=1e-30)) == {2}


def test_temperature_100_is_nearly_flat() -> None:
    logits = random_logits(20, seed=4)
    drawn = draw_many(logits, 10_000, temperature=100.0)
    assert_frequencies(drawn, brute_force(logits.tolist(), SamplingParams(temperature=100.0)))
    assert len(set(drawn)) == 20


@pytest.mark.parametrize(
    "params",
    [{"top_p": 1e-9}, {"top_p": 1e-300}, {"min_p": 1.0}, {"top_k": 1}, {"top_p": 1e-9, "min_p": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [5, 3000])
def test_only_the_most_likely_token_is_left(params: dict[str, Any], vocab_size: int) -> None:
    logits = random_logits(vocab_size, seed=vocab_size)
    assert set(draw_many(logits, 200, **params)) == {int(logits.argmax())}


@pytest.mark.parametrize("top_k", [31, 10**6, 2**31, 2**63 - 1, 2**63, 10**30])
def test_top_k_above_the_vocabulary_is_off(top_k: int) -> None:
    logits = random_logits(30, seed=1)
    assert draw_many(logits, 500, top_k=top_k, top_p=0.9) == draw_many(logits, 500, top_p=0.9)
    assert set(draw_many(logits, 5000, top_k=top_k)) <= set(range(30))


def test_min_p_1_keeps_all_that_tie_for_the_first_place() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0])
    assert set(draw_many(logits, 300, min_p=1.0)) == {1, 2, 4}


def test_top_k_cuts_ties_to_k() -> None:
    logits = torch.zeros(3000)
    assert len(set(draw_many(logits, 400, top_k=4))) == 4


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_minus_infinity_is_never_drawn(params: dict[str, Any]) -> None:
    logits = torch.full((2000,), -torch.inf)
    logits[[7, 1999]] = torch.tensor([1.0, 1.5])
    drawn = set(draw_many(logits, 300, **params))
    assert drawn == ({1999} if params.get("temperature") == 0 else {7, 1999})


BROKEN_ROWS = {
    "nan": [math.nan] * 2000,
    "one nan": [0.0] * 1000 + [math.nan] + [0.0] * 999,
    "inf": [math.inf] + [0.0] * 1999,
    "two inf": [math.inf] * 2 + [0.0] * 1998,
    "minus inf": [-math.inf] * 2000,
}


@pytest.mark.parametrize("kind", BROKEN_ROWS)
@pytest.mark.parametrize("num_columns", [10, 2000])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0},
        {"temperature": 1e-30},
        {"top_k": 3},
        {"top_p": 0.5},
        {"top_p": 0.9999999},
        {"min_p": 0.5},
        {"min_p": 1.0, "top_k": 2000, "top_p": 0.9},
        {"repetition_penalty": 2.0, "frequency_penalty": 1.0},
        {"repetition_penalty": 1e-46},
        {"min_tokens": 5},
        {"logprobs": 5},
    ],
    ids=str,
)
def test_broken_logits_give_a_token_and_harm_no_other_row(
    params: dict[str, Any], num_columns: int, kind: str
) -> None:
    broken = torch.tensor(BROKEN_ROWS[kind])
    broken = broken[-num_columns:] if kind == "minus inf" else broken[:num_columns]
    logits = torch.stack([broken, random_logits(num_columns, seed=0), broken])
    healthy = make_request(seed=9, top_p=0.9, logprobs=2)
    requests = [make_request(seed=1, **params), healthy, make_request(seed=2, **params)]
    tokens = sample(logits, requests, EOS)
    assert all(0 <= token.token_id < num_columns for token in tokens)
    assert tokens[1] == sample(logits[1:2], [healthy], EOS)[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_gpu_before_the_tokens_are_fetched(dtype: torch.dtype) -> None:
    kernels = get_backend("auto", "cuda")
    logits = torch.stack([random_logits(3000, seed=row, scale=3.0) for row in range(6)]).to(dtype)
    requests = [
        make_request(seed=1),
        make_request(temperature=0),
        make_request(seed=2, top_p=0.9, top_k=500, min_p=0.001, logprobs=5),
        make_request(seed=3, output=[4, 4, 5], repetition_penalty=1.3, frequency_penalty=0.5, logprobs=0),
        make_request(seed=4, min_tokens=3, stop_token_ids=(7,)),
        make_request(temperature=0, logprobs=2, presence_penalty=1.0),
    ]
    on_gpu = logits.cuda()
    first = sampler.sample(on_gpu, requests, EOS, kernels).fetch()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = sampler.sample(on_gpu, requests, EOS, kernels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again.fetch() == first
    on_cpu = sample(logits, requests, EOS)
    assert [token.token_id for token in on_cpu] == [token.token_id for token in first]


def test_no_rows() -> None:
    assert sample(torch.empty(0, 10), []) == []


# Ends


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 4}, {"top_p": 0.8}], ids=str)
def test_min_tokens_masks_ends_until_there_are_enough(params: dict[str, Any]) -> None:
    logits = torch.zeros(10)
    logits[[3, 5, 6]] = torch.tensor([9.0, 8.0, 7.0])  # the two ends of a turn, and a stop id
    logits[[1, 2]] = torch.tensor([2.0, 1.5])

    def drawn(num_output: int) -> set[int]:
        requests = [
            make_request(seed=s, output=[0] * num_output, min_tokens=3, stop_token_ids=(6,), **params)
            for s in range(500)
        ]
        return set(sample_ids(logits.expand(500, -1), requests, EOS))

    for num_output in (0, 1, 2):
        assert not drawn(num_output) & {3, 5, 6}
        assert 1 in drawn(num_output)
    for num_output in (3, 4):
        assert 3 in drawn(num_output)


def test_min_tokens_masks_its_own_row_only() -> None:
    logits = torch.zeros(3, 10)
    logits[:, 3] = 5.0
    requests = [make_request(temperature=0, min_tokens=n) for n in (0, 2, 0)]
    drawn = sample_ids(logits, requests, EOS)
    assert [token == 3 for token in drawn] == [True, False, True]


def test_min_tokens_with_nothing_to_mask() -> None:
    logits = random_logits(10, seed=0)[None]
    assert sample_ids(logits, [make_request(min_tokens=2, temperature=0)]) == logits.argmax(-1).tolist()


# Log probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logprobs_are_the_models_own(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(11)
    logits = torch.from_numpy(generator.normal(0, 3, (8, 50))).to(dtype)
    counts: list[int | None] = [0, 1, 5, None, 20, 2, None, 20]
    # Neither temperature nor penalties nor filters change them.
    requests = [
        make_request(
            seed=row, output=[1, 2], logprobs=count, temperature=row / 4, top_k=9, repetition_penalty=1.7
        )
        for row, count in enumerate(counts)
    ]
    for row, (token, count) in enumerate(zip(sample(logits, requests), counts, strict=True)):
        if count is None:
            assert token.logprob is None
            continue
        assert token.logprob is not None
        scores = logits[row].double().numpy()
        expected = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        assert token.logprob.token_id == token.token_id
        assert token.logprob.logprob == pytest.approx(expected[token.token_id], abs=1e-5)
        ids = [token_id for token_id, _ in token.logprob.top]
        values = [value for _, value in token.logprob.top]
        assert len(ids) == len(set(ids)) == count
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(np.sort(expected)[::-1][:count].tolist(), abs=1e-5)
        assert values == pytest.approx([expected[token_id] for token_id in ids], abs=1e-5)


def test_more_logprobs_than_tokens() -> None:
    token = sample(torch.tensor([[1.0, 2.0, 0.0]]), [make_request(logprobs=20, temperature=0)])[0]
    assert token.logprob is not None
    assert [token_id for token_id, _ in token.logprob.top] == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_logits_are_sampled_as_their_own_float32_values(dtype: torch.dtype) -> None:
    logits = random_logits(300, seed=8).to(dtype).expand(400, -1)
    requests = [make_request(seed=s, top_p=0.9, temperature=0.7) for s in range(400)]
    assert sample_ids(logits, requests) == sample_ids(logits.float(), requests)
