"""Answers follow their grammars, and everything else about them stays as it is without one."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher

from minivllm.engine import grammar as grammar_module
from minivllm.engine.engine import Engine
from minivllm.engine.grammar import Grammars, GrammarState
from minivllm.engine.runner import TorchRunner
from minivllm.errors import InvalidRequestError
from minivllm.request import FinishReason, Request, SamplingParams, TokenLogprob
from minivllm.structured import (
    grammar_from_choice,
    grammar_from_json_object,
    grammar_from_json_schema,
    grammar_from_regex,
)
from minivllm.tokenizer.tokenizer import Tokenizer

from .conftest import MakeEngine
from .schemas import SCHEMAS, check_answer

BLOCK_BYTES = 2 * 30 * 3 * 64 * 16 * 2  # keys and values of 16 tokens in the embedded model, float16
LIST_GRAMMAR = r"""
start: "[" item ("," item)* "]"
item: NUMBER | "[" item "]" | pair
pair: NAME "=" NUMBER
NAME: /[a-z]{1,5}/
NUMBER: /[0-9]{1,3}/
"""
DATE = r"(19|20)\d\d-(0[1-9]|1[0-2])/[A-Z]\w{0,5}"
TOO_COMPLEX = 'start: part~0..5000\npart: "a"? "b"? "c"?'  # fine to compile, not to follow


@dataclass
class Answer:
    """All that came of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None
    error: str | None = None
    is_refusal: bool = False
    num_preemptions: int = 0


def run(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Answer]:
    """Add all at once, step until all have ended; the engine's integrity is checked after every step."""
    answers = {str(index): Answer() for index in range(len(prompts))}
    for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        engine.add(str(index), prompt, sampling)
    while engine.has_work:
        for event in engine.step():
            answer = answers[event.request_id]
            answer.token_ids += event.new_token_ids
            answer.logprobs += event.logprobs or []
            answer.prompt_logprobs += event.prompt_logprobs or []
            answer.reason, answer.error = event.finish_reason, event.error
            answer.is_refusal = event.is_refusal
            if event.metrics is not None:
                answer.num_preemptions = event.metrics.num_preemptions
        engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    return list(answers.values())


def prompt_for(tokenizer: Tokenizer, what: str) -> list[int]:
    return tokenizer.encode_chat([{"role": "user", "content": f"Write {what}."}])


def mixed_load(tokenizer: Tokenizer) -> tuple[list[list[int]], list[SamplingParams]]:
    """Grammars of all kinds, with all that changes how tokens are chosen, beside requests without one."""
    json_grammar = grammar_from_json_schema(SCHEMAS["formats"])
    params = [
        SamplingParams(max_tokens=60, seed=1, grammar=json_grammar),
        SamplingParams(max_tokens=30, seed=2),
        SamplingParams(max_tokens=60, temperature=0.0, grammar=json_grammar, logprobs=2),
        SamplingParams(max_tokens=30, seed=3, grammar=LIST_GRAMMAR, min_tokens=20),
        SamplingParams(max_tokens=30, temperature=0.0),
        SamplingParams(max_tokens=40, seed=4, grammar=grammar_from_regex(DATE), presence_penalty=1.0),
        SamplingParams(max_tokens=40, seed=5, top_p=0.9, grammar=grammar_from_json_object()),
        SamplingParams(max_tokens=40, seed=6, top_k=20, min_p=0.05, grammar=LIST_GRAMMAR, stop=("=",)),
    ]
    return [prompt_for(tokenizer, f"document number {i}") for i in range(len(params))], params


@pytest.fixture(scope="module")
def mixed_answers(make: MakeEngine, tokenizer: Tokenizer) -> list[Answer]:
    return run(make(enable_prefix_caching=False), *mixed_load(tokenizer))


def test_no_mask_is_left_behind_by_a_step_that_does_not_fit(
    make: MakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is tried again, and two threads must not follow one grammar at once."""
    engine = make()
    runner = engine.runner
    assert isinstance(runner, TorchRunner)
    has_raised, num_at_work, most_at_work = threading.Event(), 0, 0
    hidden, fill_mask = runner.model.hidden, GrammarState.fill_mask

    def raise_once(*args: Any) -> torch.Tensor:
        if not has_raised.is_set():
            has_raised.set()
            raise torch.OutOfMemoryError("the card is full.")
        return hidden(*args)

    def fill_slowly(self: GrammarState, *args: Any) -> str | None:
        nonlocal num_at_work, most_at_work
        num_at_work += 1
        most_at_work = max(most_at_work, num_at_work)
        has_raised.wait()
        time.sleep(0.1)  # the next step would come by
        num_at_work -= 1
        return fill_mask(self, *args)

    monkeypatch.setattr(runner.grammars, "_num_maskers", 2)
    monkeypatch.setattr(runner.model, "hidden", raise_once)
    monkeypatch.setattr(GrammarState, "fill_mask", fill_slowly)
    sampling = SamplingParams(max_tokens=3, seed=1, grammar=grammar_from_regex("[a-z]{20}"))
    (answer,) = run(engine, [prompt_for(tokenizer, "a word")], [sampling])
    assert (answer.reason, len(answer.token_ids)) == (FinishReason.LENGTH, 3)
    assert most_at_work == 1


def test_answers_satisfy_their_schemas(make: MakeEngine, tokenizer: Tokenizer) -> None:
    """Sampled at temperature 1 by a model that can hardly write JSON."""
    names = [name for name in SCHEMAS for _ in range(3)]
    params = [
        SamplingParams(max_tokens=250, seed=seed, grammar=grammar_from_json_schema(SCHEMAS[name]))
        for seed, name in enumerate(names)
    ]
    prompts = [prompt_for(tokenizer, f"a JSON document with {name}") for name in names]
    answers = run(make(max_num_seqs=24), prompts, params)
    finished = [
        (name, answer)
        for name, answer in zip(names, answers, strict=True)
        if answer.reason is FinishReason.STOP
    ]
    for name, answer in finished:
        check_answer(tokenizer.decode(answer.token_ids), SCHEMAS[name])
    # Nothing but max_tokens keeps one from its end, and only recursion can be endless.
    assert {name for name, _ in finished} >= set(SCHEMAS) - {"recursion"}
    assert len(finished) >= len(names) - 4


def test_regex_choice_and_lark(make: MakeEngine, tokenizer: Tokenizer) -> None:
    choices = ["yes", "yes, sir", "no", 'a "quoted" \\ one\n', "да 😀", "no"]
    grammars = [grammar_from_regex(DATE), grammar_from_choice(choices), LIST_GRAMMAR]
    params = [
        SamplingParams(max_tokens=150, seed=seed, grammar=grammar)
        for grammar in grammars
        for seed in range(8)
    ]
    answers = run(make(), [prompt_for(tokenizer, "anything")] * len(params), params)
    assert {answer.reason for answer in answers[:16]} == {FinishReason.STOP}
    texts = [tokenizer.decode(answer.token_ids) for answer in answers]
    assert all(re.fullmatch(DATE, text) for text in texts[:8]), texts[:8]
    assert set(texts[8:16]) <= set(choices)
    item = r"\[*([0-9]{1,3}|[a-z]{1,5}=[0-9]{1,3})\]*"
    finished = [
        text for text, a in zip(texts[16:], answers[16:], strict=True) if a.reason is FinishReason.STOP
    ]
    assert finished
    for text in finished:
        assert re.fullmatch(rf"\[{item}(,{item})*\]", text), text
        assert text.count("[") == text.count("]")


@pytest.mark.parametrize("variant", ["alone", "evicted", "chunked", "one step ahead", "contiguous"])
def test_the_schedule_changes_nothing(
    make: MakeEngine, tokenizer: Tokenizer, mixed_answers: list[Answer], variant: str
) -> None:
    prompts, params = mixed_load(tokenizer)
    settings = {
        "alone": {"scheduler": "sequential"},
        "evicted": {"kv_cache_memory": 14 * BLOCK_BYTES, "max_model_len": 200},
        "chunked": {"max_num_batched_tokens": 13},
        "one step ahead": {"runs_ahead": True},
        "contiguous": {"kv_allocation": "contiguous", "max_model_len": 400},
    }[variant]
    answers = run(make(**settings), prompts, params)
    assert [answer.error for answer in answers] == [None] * len(answers)
    assert [a.token_ids for a in answers] == [a.token_ids for a in mixed_answers]
    assert [a.reason for a in answers] == [a.reason for a in mixed_answers]
    if variant == "evicted":
        assert sum(answer.num_preemptions for answer in answers) > 0


def test_cached_prompts_change_nothing(
    make: MakeEngine, tokenizer: Tokenizer, mixed_answers: list[Answer]
) -> None:
    engine = make()
    prompts, params = mixed_load(tokenizer)
    run(engine, prompts, [replace(p, max_tokens=1, min_tokens=0) for p in params])
    answers = run(engine, prompts, params)
    assert engine.stats().prefix_cache_hits > 0
    assert [a.token_ids for a in answers] == [a.token_ids for a in mixed_answers]


def test_others_get_the_tokens_that_they_get_alone(
    make: MakeEngine, tokenizer: Tokenizer, mixed_answers: list[Answer]
) -> None:
    prompts, params = mixed_load(tokenizer)
    free = [index for index, p in enumerate(params) if p.grammar is None]
    alone = run(make(), [prompts[i] for i in free], [params[i] for i in free])
    assert [mixed_answers[i].token_ids for i in free] == [answer.token_ids for answer in alone]


def test_logprobs_are_the_models_own(make: MakeEngine, tokenizer: Tokenizer) -> None:
    """Those of the answer, read back as a prompt that no grammar restricts."""
    engine = make()
    prompt = prompt_for(tokenizer, "a poem")
    grammar = grammar_from_json_schema(SCHEMAS["enums"])
    [answer] = run(engine, [prompt], [SamplingParams(max_tokens=60, seed=1, grammar=grammar, logprobs=1)])
    [again] = run(engine, [prompt + answer.token_ids], [SamplingParams(max_tokens=1, prompt_logprobs=0)])
    own = again.prompt_logprobs[len(prompt) - 1 :]
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    for entry, expected in zip(answer.logprobs, own, strict=True):
        assert entry.logprob == pytest.approx(expected.logprob, abs=1e-3)
    # The model itself would have said something else.
    assert any(entry.top[0][0] != entry.token_id for entry in answer.logprobs)


def test_a_finished_answer_ends_whatever_was_asked(make: MakeEngine, tokenizer: Tokenizer) -> None:
    """ignore_eos and min_tokens hold while the grammar can go on, and no longer."""
    sampling = SamplingParams(max_tokens=60, seed=1)
    exactly = replace(sampling, grammar=grammar_from_choice(["It is so.", "It is not."]))
    more = replace(sampling, grammar=grammar_from_regex("(ha)*"))
    bounded = replace(sampling, grammar=grammar_from_regex("(ha ){0,12}"))
    params = [
        exactly,
        replace(exactly, ignore_eos=True),
        replace(exactly, min_tokens=50),
        replace(exactly, min_tokens=50, ignore_eos=True, stop_token_ids=(28,)),
        replace(more, min_tokens=30),
        replace(more, ignore_eos=True),
        replace(bounded, ignore_eos=True),
    ]
    answers = run(make(), [prompt_for(tokenizer, "anything")] * len(params), params)
    texts = [tokenizer.decode(answer.token_ids) for answer in answers]
    reasons = [answer.reason for answer in answers]
    assert set(texts[:4]) <= {"It is so.", "It is not."}
    assert reasons[:4] == [FinishReason.STOP] * 4
    assert len(answers[4].token_ids) >= 30
    assert reasons[5] is FinishReason.LENGTH
    assert len(answers[5].token_ids) == 60
    assert (texts[6], reasons[6]) == ("ha " * 12, FinishReason.STOP)


def test_stop_token_ids_end_an_answer_early(make: MakeEngine, tokenizer: Tokenizer) -> None:
    [comma] = tokenizer.encode(",")
    sampling = SamplingParams(
        max_tokens=60, seed=1, grammar="start: /[0-9](,[0-9]){20}/", stop_token_ids=(comma,), min_tokens=4
    )
    [answer] = run(make(), [prompt_for(tokenizer, "numbers")], [sampling])
    # The first two commas come too early: nothing else was left to choose, and they end nothing.
    assert re.fullmatch("([0-9],){3}", tokenizer.decode(answer.token_ids))
    assert (len(answer.token_ids), answer.token_ids[-1]) == (6, comma)
    assert answer.reason is FinishReason.STOP


def test_stop_token_ids_are_masked_until_they_may_come(tokenizer: Tokenizer, grammars: Grammars) -> None:
    [comma], [digit] = tokenizer.encode(","), tokenizer.encode("1")
    sampling = SamplingParams(
        max_tokens=60, grammar="start: /[0-9,]+/", stop_token_ids=(comma,), min_tokens=2
    )
    request = Request("r", [1], sampling, seed=0, max_total_tokens=100)
    request.grammar = grammars.begin("start: /[0-9,]+/")
    allowed = []
    for _ in range(3):
        pending = grammars.start_mask([request])
        assert pending is not None
        mask, errors = pending.wait()
        assert not errors
        bits = np.unpackbits(mask.bits_RB[0], bitorder="little")
        allowed.append((bool(bits[digit]), bool(bits[comma])))
        request.token_ids.append(digit)
    assert allowed == [(True, False), (True, False), (True, True)]


def test_masks_that_take_too_long_end_their_request(
    make: MakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MASK_BURST_SECONDS", -1.0)  # whatever they take
    monkeypatch.setattr(grammar_module, "MASK_SECONDS_PER_TOKEN", 0.0)
    params = [
        SamplingParams(max_tokens=4, grammar=LIST_GRAMMAR),
        SamplingParams(max_tokens=4, ignore_eos=True),
    ]
    answers = run(make(), [prompt_for(tokenizer, "a list")] * 2, params)
    assert [answer.reason for answer in answers] == [FinishReason.ERROR, FinishReason.LENGTH]
    assert "takes too long" in str(answers[0].error)


def test_a_grammar_that_fails_ends_its_own_request_only(make: MakeEngine, tokenizer: Tokenizer) -> None:
    prompt = prompt_for(tokenizer, "anything")
    good = SamplingParams(max_tokens=40, seed=1, grammar=LIST_GRAMMAR)
    [expected] = run(make(), [prompt], [good])
    bad = [
        SamplingParams(max_tokens=40, seed=1, grammar="start: nothing"),
        SamplingParams(max_tokens=40, seed=1, grammar=TOO_COMPLEX),
    ]
    answers = run(make(), [prompt] * 3, [good, *bad])
    assert answers[0] == expected
    assert [(answer.reason, answer.is_refusal) for answer in answers[1:]] == [(FinishReason.ERROR, True)] * 2
    assert "nothing" in str(answers[1].error)
    assert "Too many items" in str(answers[2].error)


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_aborts(make: MakeEngine, tokenizer: Tokenizer, num_steps: int) -> None:
    """While the grammar is compiled, and while it is followed."""
    engine = make()
    for index in range(4):
        grammar = f"{LIST_GRAMMAR}\n// {num_steps} {index}"  # not compiled before
        engine.add(
            str(index), prompt_for(tokenizer, "a list"), SamplingParams(max_tokens=30, grammar=grammar)
        )
    for _ in range(num_steps):
        engine.step()
    engine.check_integrity()
    for index in range(4):
        event = engine.abort(str(index))
        assert event is None or event.finish_reason is FinishReason.ABORT
        engine.check_integrity()
    while engine.has_work:
        assert engine.step() == []
    assert engine.stats().num_used_blocks == 0


def test_compiling_delays_nobody(
    make: MakeEngine, tokenizer: Tokenizer, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another request runs to its end while a grammar is compiled."""
    may_compile = threading.Event()
    compile_grammar = grammars._compile

    def compile_later(grammar: str) -> LLMatcher:
        may_compile.wait()
        return compile_grammar(grammar)

    monkeypatch.setattr(grammars, "_compile", compile_later)
    engine = make()
    sampling = SamplingParams(max_tokens=4, grammar=f"{LIST_GRAMMAR}\n// not compiled before")
    engine.add("waits", prompt_for(tokenizer, "an object"), sampling)
    stats = engine.stats()
    engine.add("goes on", prompt_for(tokenizer, "a word"), SamplingParams(max_tokens=2, ignore_eos=True))
    ended = []
    while engine.has_work:
        ended += [event.request_id for event in engine.step() if event.finish_reason is not None]
        if ended:
            may_compile.set()
    assert ended == ["goes on", "waits"]
    assert stats.num_waiting == stats.num_compiling == 1


def test_a_model_that_cannot_end_follows_no_grammar(tokenizer: Tokenizer) -> None:
    grammars = Grammars(lambda: tokenizer, vocab_size=100, eos_token_ids=[])
    with pytest.raises(InvalidRequestError, match="no end-of-turn token"):
        grammars.begin(LIST_GRAMMAR)
