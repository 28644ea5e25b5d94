"""``draw`` and ``keep_likely`` of every backend, against their definitions in NumPy and Python."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.kernels.conftest import Backend

INT32 = 2**32
FACTORS = (0x85EBCA6B, 0xC2B2AE35)


def mix(bits: np.ndarray) -> np.ndarray:
    """MurmurHash3's 32-bit finaliser, in 64-bit arithmetic."""
    bits = bits ^ (bits >> 16)
    bits = bits * FACTORS[0] % INT32
    bits = bits ^ (bits >> 13)
    bits = bits * FACTORS[1] % INT32
    return bits ^ (bits >> 16)


def unmix(bits: int) -> int:
    """The inverse of ``mix``: factors are odd, and a shift undoes itself by repetition."""
    bits ^= bits >> 16
    bits = bits * pow(FACTORS[1], -1, INT32) % INT32
    bits ^= (bits >> 13) ^ (bits >> 26)
    bits = bits * pow(FACTORS[0], -1, INT32) % INT32
    return bits ^ (bits >> 16)


def gumbel_noise(keys_L2: torch.Tensor, vocab_size: int) -> np.ndarray:
    """In float64, of a uniform number that is float32's: the definition."""
    keys = keys_L2.cpu().numpy().astype(np.int64) % INT32
    bits = mix(mix((np.arange(vocab_size) + keys[:, :1]) % INT32) ^ keys[:, 1:])
    uniform = ((bits % 2**31).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    uniform = np.minimum(uniform, np.float32(1 - 2.0**-24)).astype(np.float64)
    return -np.log(-np.log1p(-uniform))


def random_keys(rng: np.random.Generator, num_rows: int, device: torch.device) -> torch.Tensor:
    keys = rng.integers(-(2**31), 2**31, (num_rows, 2))
    return torch.from_numpy(keys.astype(np.int32)).to(device)


def floats(values: object, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(device)


# draw


@pytest.mark.parametrize(
    ("num_rows", "vocab_size"),
    [(1, 1), (3, 7), (2, 16), (40, 1000), (1, 4097), (5, 9001), (1, 50_000), (60, 32_003)],
)
def test_a_draw_is_the_largest_of_the_noisy_scores(
    backend: Backend, rng: np.random.Generator, num_rows: int, vocab_size: int
) -> None:
    num_rows = backend.size(num_rows, slow=min(num_rows, 3))
    scores = floats(rng.normal(0, rng.uniform(0.5, 6), (num_rows, vocab_size)), backend.device)
    temperature = floats(rng.choice([0.0, 0.01, 0.3, 0.8, 1.0, 2.0, 100.0], num_rows), backend.device)
    keys = random_keys(rng, num_rows, backend.device)
    before = scores.clone()
    drawn = backend.kernels.draw(scores, temperature, keys)
    assert drawn.dtype == torch.int64
    assert torch.equal(scores, before)
    noise = gumbel_noise(keys, vocab_size) * temperature.double().cpu().numpy()[:, None]
    noisy = scores.double().cpu().numpy() + noise
    for row, token in enumerate(drawn.tolist()):
        # Float32 may mistake one for another that is this close.
        assert noisy[row, token] >= noisy[row].max() - 1e-5 * max(1.0, float(temperature[row]))
    greedy = backend.kernels.draw(scores)
    assert greedy.tolist() == scores.argmax(-1).tolist()


@pytest.mark.parametrize("bits", [0, 1, 1000, 2**24 + 1, 2**30, 2**31 - 129, 2**31 - 1, 2**31, 2**32 - 1])
def test_the_noise_is_exact_at_its_extremes(backend: Backend, rng: np.random.Generator, bits: int) -> None:
    """A token whose noise is this one's wins by a hair against one without noise to speak of, or loses."""
    vocab_size, token = 20, int(rng.integers(0, 20))
    low = int(rng.integers(0, INT32))
    high = unmix(bits) ^ int(mix(np.array([(token + low) % INT32]))[0])
    key = np.array([[low, high]], dtype=np.uint32).view(np.int32)
    keys = torch.from_numpy(key).to(backend.device)
    noise = gumbel_noise(keys, vocab_size)[0]
    assert -2.9 < noise[token] < 22.3
    other = (token + 1) % vocab_size
    for margin, winner in ((1e-5, token), (-1e-5, other)):
        scores = np.full((1, vocab_size), -np.inf)
        scores[0, token] = 0.0
        scores[0, other] = noise[token] - noise[other] - margin
        drawn = backend.kernels.draw(floats(scores, backend.device), floats([1.0], backend.device), keys)
        assert drawn.tolist() == [winner]


def test_a_lone_token_wins_with_any_noise(backend: Backend, rng: np.random.Generator) -> None:
    count = backend.size(50, slow=6)
    scores = torch.full((count, 300), -torch.inf, device=backend.device)
    only = rng.integers(0, 300, count)
    scores[torch.arange(count), torch.from_numpy(only)] = floats(rng.normal(0, 300, count), backend.device)
    temperature = floats(rng.choice([0.0, 1.0, 100.0], count), backend.device)
    drawn = backend.kernels.draw(scores, temperature, random_keys(rng, count, backend.device))
    assert drawn.tolist() == only.tolist()


def test_of_equal_scores_the_first_is_chosen(backend: Backend, rng: np.random.Generator) -> None:
    num_rows = backend.size(30, slow=3)
    scores = np.round(rng.normal(0, 1, (num_rows, 5001)))
    want = scores.argmax(-1).tolist()
    temperature = torch.zeros(num_rows, device=backend.device)
    keys = random_keys(rng, num_rows, backend.device)
    assert backend.kernels.draw(floats(scores, backend.device)).tolist() == want
    assert backend.kernels.draw(floats(scores, backend.device), temperature, keys).tolist() == want


@pytest.mark.parametrize("is_greedy", [False, True])
@pytest.mark.parametrize("vocab_size", [9, 5000])
def test_broken_scores(backend: Backend, rng: np.random.Generator, vocab_size: int, is_greedy: bool) -> None:
    scores = np.zeros((5, vocab_size))
    scores[0] = np.nan
    scores[1] = -np.inf
    scores[2, 3:] = np.nan
    scores[3, [4, 7]] = np.inf
    scores[4] = -np.inf
    scores[4, 8], scores[4, 2] = -3e38, np.nan
    settings = (
        () if is_greedy else (torch.ones(5, device=backend.device), random_keys(rng, 5, backend.device))
    )
    drawn = backend.kernels.draw(floats(scores, backend.device), *settings).tolist()
    assert drawn[:2] == [0, 0]
    assert drawn[2] < 3
    assert drawn[3:] == [4, 8]


def test_draws_have_the_distribution_of_the_softmax(backend: Backend) -> None:
    """Pearson's chi-square, with numbers that are the same in every run."""
    rng = np.random.default_rng(5)
    count, vocab_size, temperature = backend.size(40_000, slow=150), 5, 0.7
    scores = rng.normal(0, 1, vocab_size).astype(np.float32)
    rows = torch.from_numpy(scores).to(backend.device).expand(count, -1)
    settings = torch.full((count,), temperature, device=backend.device)
    drawn = backend.kernels.draw(rows, settings, random_keys(rng, count, backend.device)).tolist()
    weights = np.exp(scores.astype(np.float64) / temperature)
    counts = Counter(drawn)
    expected = count * weights / weights.sum()
    chi_square = sum((counts[token] - want) ** 2 / want for token, want in enumerate(expected))
    assert chi_square < 18.5  # 4 degrees of freedom: above it once in 1,000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_draw_from_half_precision(backend: Backend, rng: np.random.Generator, dtype: torch.dtype) -> None:
    num_rows = backend.size(9, slow=2)
    scores = floats(rng.normal(0, 3, (num_rows, 700)), backend.device).to(dtype)
    temperature = torch.ones(num_rows, device=backend.device)
    keys = random_keys(rng, num_rows, backend.device)
    have = backend.kernels.draw(scores, temperature, keys)
    assert torch.equal(have, backend.kernels.draw(scores.float(), temperature, keys))
    settings = [floats(np.full(num_rows, value), backend.device) for value in (0.01, 300, 0.9)]
    kept = backend.kernels.keep_likely(scores, temperature, *settings)
    assert torch.equal(kept, backend.kernels.keep_likely(scores.float(), temperature, *settings))


def test_a_row_is_sampled_alone_as_in_a_batch(backend: Backend, rng: np.random.Generator) -> None:
    """To the bit: rows alone, a batch of all, one backwards, and rows that lie apart in memory."""
    num_rows, vocab_size = backend.size(6, slow=3), 5003
    wide = floats(rng.normal(0, 3, (num_rows, vocab_size + 9)), backend.device)
    wide[1] = wide[1].bfloat16().float()  # ties
    scores = wide[:, 4:-5]
    settings = [
        floats(rng.choice(values, num_rows), backend.device)
        for values in ([0.0, 0.5, 1.0], [0.0, 1e-4, 0.1], [5, 900, vocab_size], [0.3, 0.95, 1.0])
    ]
    keys = random_keys(rng, num_rows, backend.device)

    def sample(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = backend.kernels.keep_likely(scores[rows], *(values[rows] for values in settings))
        return kept, backend.kernels.draw(kept, settings[0][rows], keys[rows])

    order = torch.arange(num_rows, device=backend.device)
    kept, drawn = sample(order)
    backwards = sample(order.flip(0))
    assert torch.equal(backwards[0].flip(0), kept)
    assert torch.equal(backwards[1].flip(0), drawn)
    apart = backend.kernels.keep_likely(scores, *settings)
    assert torch.equal(apart, kept)
    for row in range(num_rows):
        alone = sample(order[row : row + 1])
        assert torch.equal(alone[0][0], kept[row])
        assert alone[1][0] == drawn[row]


def test_no_rows_at_all(backend: Backend) -> None:
    empty = torch.empty(0, 10, device=backend.device)
    settings = [torch.empty(0, device=backend.device) for _ in range(4)]
    keys = torch.empty(0, 2, dtype=torch.int32, device=backend.device)
    assert backend.kernels.keep_likely(empty, *settings).shape == (0, 10)
    assert backend.kernels.draw(empty, settings[0], keys).shape == (0,)
    assert backend.kernels.draw(empty).shape == (0,)


# keep_likely


def likely(scores: list[float], temperature: float, min_p: float, top_k: float, top_p: float) -> set[int]:
    """The tokens that stay, in Python floats, one by one from the likeliest; equal ones in their order."""
    highest = max(scores)
    weights = [math.exp((score - highest) / temperature) for score in scores]
    ranked = sorted(range(len(scores)), key=lambda token: (-weights[token], token))
    ranked = [token for token in ranked if weights[token] >= min_p][: int(top_k)]
    total = math.fsum(weights[token] for token in ranked)
    kept: set[int] = set()
    mass = 0.0
    for token in ranked:
        if kept and top_p < 1.0 and mass >= top_p * total:
            break
        kept.add(token)
        mass += weights[token]
    return kept


@pytest.mark.parametrize("vocab_size", [1, 5, 100, 2049, 9000])
@pytest.mark.parametrize("has_ties", [False, True])
def test_what_is_likely_is_kept(
    backend: Backend, rng: np.random.Generator, has_ties: bool, vocab_size: int
) -> None:
    num_rows = backend.size(24, slow=3)
    scores = floats(rng.normal(0, rng.uniform(0.3, 4), (num_rows, vocab_size)), backend.device)
    if has_ties:
        scores = scores.bfloat16().float()
    temperature = rng.choice([0.1, 0.7, 1.0, 10.0], num_rows)
    min_p = rng.choice([0.0, 0.0, 1e-3, 0.2], num_rows)
    top_k = rng.choice([vocab_size, vocab_size, 1, 2, 17, 40, 1500], num_rows)
    top_p = rng.choice([1.0, 1.0, 0.05, 0.5, 0.9, 0.99], num_rows)
    settings = [floats(values, backend.device) for values in (temperature, min_p, top_k, top_p)]
    before = scores.clone()
    kept = backend.kernels.keep_likely(scores, *settings)
    assert torch.equal(scores, before)
    assert kept.dtype == torch.float32
    is_kept = kept > -torch.inf
    assert torch.equal(kept[is_kept], scores[is_kept])
    for row in range(num_rows):
        have = set(is_kept[row].nonzero().flatten().tolist())
        exact = [float(values[row]) for values in settings]
        # Float32's weights and sums may move an edge by this much.
        tight, loose = (
            likely(
                scores[row].tolist(),
                exact[0],
                exact[1] * (1 - side),
                exact[2],
                exact[3] + side * (exact[3] < 1),
            )
            for side in (-2e-6, 2e-6)
        )
        assert tight <= have <= loose


def test_cuts_through_equal_scores_keep_the_first(backend: Backend, rng: np.random.Generator) -> None:
    scores = torch.zeros(6, 3000, device=backend.device)
    scores[3, 1::2] = 1.0
    scores[4, :4] = 5.0
    scores[5, 2999] = 1.0
    rows: list[tuple[float, float, float]] = [  # min-p, top-k, top-p
        (0.0, 4, 1.0),
        (0.0, 3000, 0.25),
        (0.0, 200, 0.25),
        (1.0, 3, 1.0),
        (0.9, 3000, 0.5),
        (0.0, 3, 1.0),
    ]
    temperature = torch.ones(6, device=backend.device)
    settings = [floats(values, backend.device) for values in zip(*rows, strict=True)]
    kept = backend.kernels.keep_likely(scores, temperature, *settings) > -torch.inf
    want = [range(4), range(750), range(50), [1, 3, 5], range(2), [0, 1, 2999]]
    assert [row.nonzero().flatten().tolist() for row in kept] == [list(tokens) for tokens in want]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1.0, 100.0])
def test_the_likeliest_token_is_always_kept(
    backend: Backend, rng: np.random.Generator, temperature: float
) -> None:
    scores = floats(rng.normal(0, 1, (5, 40)), backend.device)
    rows = [(1.0, 40, 1.0), (0.0, 1, 1.0), (0.0, 40, 1e-9), (0.0, 40, 1e-45), (1.0, 1, 1e-9)]
    settings = [floats(values, backend.device) for values in zip(*rows, strict=True)]
    kept = backend.kernels.keep_likely(scores, floats([temperature] * 5, backend.device), *settings)
    assert (kept > -torch.inf).sum(-1).tolist() == [1] * 5
    assert kept.argmax(-1).tolist() == scores.argmax(-1).tolist()


def test_filters_of_broken_scores(backend: Backend, rng: np.random.Generator) -> None:
    """NaN is minus infinity; an infinity leaves no chance to anything else; greedy rows keep the rest."""
    scores = rng.normal(0, 1, (6, 50)).astype(np.float32)
    scores[0, 10:] = np.nan
    scores[1, [4, 7]] = np.inf
    scores[2] = np.nan
    scores[3] = -np.inf
    scores[4, 20] = np.nan
    scores[5, 5:] = -np.inf
    temperature, min_p = floats([1, 1, 1, 1, 0, 1], backend.device), floats([0.0] * 6, backend.device)
    top_k, top_p = floats([50, 50, 3, 3, 1, 20], backend.device), floats([0.999] * 6, backend.device)
    kept = backend.kernels.keep_likely(floats(scores, backend.device), temperature, min_p, top_k, top_p).cpu()
    support = [set(row.nonzero().flatten().tolist()) for row in kept > -torch.inf]
    assert support[0] == likely(scores[0, :10].tolist(), 1.0, 0.0, 50, 0.999)
    assert support[1] == {4, 7}
    assert support[2] == support[3] == set()
    assert support[4] == set(range(50)) - {20}
    assert support[5] <= set(range(5))
    assert not kept.isnan().any()
