"""Log probabilities of a prompt's own tokens, against transformers; and what a logit bias does."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from minivllm.engine.engine import Engine
from minivllm.errors import InvalidRequestError
from minivllm.request import EngineEvent, SamplingParams, check_request
from tests.conftest import Oracle
from tests.tiny_model import VOCAB_SIZE

MakeEngine = Callable[..., Engine]


def run(engine: Engine, prompts: list[list[int]], sampling: SamplingParams) -> list[list[EngineEvent]]:
    events: dict[str, list[EngineEvent]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, sampling)
    while engine.has_work:
        for event in engine.step():
            if event.new_token_ids:  # others tell that a long prompt was begun
                events[event.request_id].append(event)
            else:
                assert event.prompt_logprobs is None
        engine.check_integrity()
    return list(events.values())


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 24}])
def test_they_are_transformers_own(
    make_embedded_engine: MakeEngine, oracle: Oracle, settings: dict[str, int]
) -> None:
    """Whole and in chunks, for prompts that begin alike, and of one token."""
    rng = random.Random(5)
    shared = [rng.randrange(1000, 40000) for _ in range(48)]
    prompts = [[77], [*shared, 7, 8, 9], shared + [rng.randrange(40000) for _ in range(60)], shared[:17]]
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, prompt_logprobs=3)
    for prompt, events in zip(prompts, run(make_embedded_engine(**settings), prompts, sampling), strict=True):
        with torch.inference_mode():
            table = oracle.model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
        have = events[0].prompt_logprobs
        assert have is not None
        assert all(event.prompt_logprobs is None for event in events[1:])
        assert [entry.token_id for entry in have] == prompt[1:]
        for place, entry in enumerate(have):
            want = table[place]
            assert entry.logprob == pytest.approx(want[entry.token_id].item(), abs=2e-3)
            rank = int((want > want[entry.token_id]).sum()) + 1
            assert entry.rank == pytest.approx(rank, abs=1 + rank // 100)  # neighbours may be near-ties
            assert [value for _, value in entry.top] == pytest.approx(want.topk(3).values.tolist(), abs=2e-3)
            for token_id, value in entry.top:
                assert want[token_id].item() == pytest.approx(value, abs=2e-3)


def test_a_preempted_prompt_has_them_once(make_tiny_engine: MakeEngine) -> None:
    """What is computed again after an eviction is told once, and is the same."""
    rng = random.Random(6)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(60)] for _ in range(4)]
    sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    small = make_tiny_engine(num_blocks=18)
    have = run(small, prompts, sampling)
    assert small.stats().num_preemptions > 0
    want = run(make_tiny_engine(), prompts, sampling)
    for ours, theirs in zip(have, want, strict=True):
        assert ours[0].prompt_logprobs is not None
        assert theirs[0].prompt_logprobs is not None
        assert [entry.logprob for entry in ours[0].prompt_logprobs] == pytest.approx(
            [entry.logprob for entry in theirs[0].prompt_logprobs], abs=1e-3
        )
        assert all(event.prompt_logprobs is None for event in ours[1:])


def test_a_bias_forbids_and_forces(make_embedded_engine: MakeEngine) -> None:
    """The most likely token, forbidden, gives way to the second; an unlikely one, pushed, wins."""
    prompt = [504, 3575, 282, 4649, 314]
    engine = make_embedded_engine()

    def first(sampling: SamplingParams) -> EngineEvent:
        ((event,),) = run(engine, [prompt], sampling)
        return event

    plain = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, ignore_eos=True)
    event = first(plain)
    assert event.logprobs is not None
    (best, _), (second, second_logprob) = event.logprobs[0].top
    forbidden = first(SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, logit_bias={best: -100.0}))
    assert forbidden.new_token_ids == [second]
    assert forbidden.logprobs is not None
    # Log probabilities are the model's own, without the bias.
    assert forbidden.logprobs[0].logprob == pytest.approx(second_logprob, abs=1e-4)
    for temperature in (0.0, 1.0):
        forced = first(SamplingParams(max_tokens=1, temperature=temperature, logit_bias={4321: 100.0}))
        assert forced.new_token_ids == [4321]


@pytest.mark.parametrize("bias", [{5: 100.5}, {5: float("nan")}, {-1: 1.0}, dict.fromkeys(range(1025), 1.0)])
def test_a_bad_bias_is_refused(bias: dict[int, float]) -> None:
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_a_biased_token_must_be_in_the_vocabulary(make_embedded_engine: MakeEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"logit_bias.*49152"):
        check_request([1], SamplingParams(logit_bias={49152: 1.0}), make_embedded_engine().info)
