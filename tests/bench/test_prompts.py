"""Texts have the tokens they should, and share what they should and nothing else."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.tokenizer.gguf_vocab import tokenizer_from_gguf
from minivllm.tokenizer.tokenizer import Tokenizer
from minivllm_bench.prompts import WORDS, Conversation, TextSource
from minivllm_bench.workloads import Session, Turn
from tests.tokenizer.vocabularies import llama3_metadata, smollm_metadata


@cache
def tokenizer(name: str) -> Tokenizer:
    return tokenizer_from_gguf(smollm_metadata() if name == "smollm" else llama3_metadata())


def converse(source: TextSource, number: int, session: Session, answer: str = " well then") -> Conversation:
    talk = Conversation(source, number, session)
    for place, turn in enumerate(session.turns):
        if place:
            talk.answer(answer, len(answer.split()))
        talk.ask(turn)
    return talk


sessions = st.builds(
    Session,
    st.lists(st.builds(Turn, st.integers(1, 300), st.integers(1, 100)), min_size=1, max_size=4).map(tuple),
    st.integers(0, 200),
)


@pytest.mark.parametrize("name", ["smollm", "llama3"])
@given(st.integers(0, 2**32), st.integers(0, 10**6), sessions)
@settings(max_examples=25)
def test_as_many_tokens_as_the_workload_says(name: str, seed: int, number: int, session: Session) -> None:
    talk = converse(TextSource(seed), number, session)
    tokens = tokenizer(name).encode(talk.prompt, add_special_tokens=False)
    assert len(tokens) == talk.prompt_tokens
    asked = session.shared_prefix_tokens + sum(turn.prompt_tokens for turn in session.turns)
    assert talk.prompt_tokens == asked + 2 * (len(session.turns) - 1)


@pytest.mark.parametrize("name", ["smollm", "llama3"])
def test_every_word_is_one_token(name: str) -> None:
    assert len(set(WORDS)) == len(WORDS)
    for word in WORDS:
        for text in (word, f" {word}"):
            assert len(tokenizer(name).encode(text, add_special_tokens=False)) == 1, text


@given(st.integers(), st.sets(st.integers(0, 10**6), min_size=2, max_size=20))
def test_sessions_differ_at_their_start(seed: int, numbers: set[int]) -> None:
    source = TextSource(seed)
    starts = [tuple(source.turn(number, 0, 20).split()[:3]) for number in numbers]
    assert len(set(starts)) == len(numbers)
    if max(numbers) < len(WORDS):
        assert len({start[0] for start in starts}) == len(numbers)


@given(sessions, st.integers(0, 1000))
def test_the_same_seed_says_the_same(session: Session, number: int) -> None:
    def say(seed: int) -> str:
        return converse(TextSource(seed), number, session).prompt

    assert say(1) == say(1)
    if session.turns[0].prompt_tokens >= 20:
        assert say(1) != say(2)


@given(sessions, sessions)
def test_the_shared_prefix_is_shared_and_nothing_else(one: Session, other: Session) -> None:
    source = TextSource(3)
    prefix = min(one.shared_prefix_tokens, other.shared_prefix_tokens)
    words = [converse(source, number, session).prompt.split() for number, session in enumerate((one, other))]
    assert words[0][:prefix] == words[1][:prefix]
    if one.shared_prefix_tokens == other.shared_prefix_tokens:
        assert words[0][prefix] != words[1][prefix]


def test_each_turn_starts_with_all_before_it() -> None:
    session = Session((Turn(5, 3), Turn(2, 3), Turn(1, 3, "Word for word!")), shared_prefix_tokens=4)
    talk = Conversation(TextSource(0), 0, session)
    talk.ask(session.turns[0])
    first = talk.prompt
    assert len(first.split()) == 9 == talk.prompt_tokens
    talk.answer(" I\nsee.", 3)
    talk.ask(session.turns[1])
    second = talk.prompt
    assert second.startswith(first + " I\nsee. ")
    assert talk.prompt_tokens == 9 + 3 + 2
    talk.answer("", 0)
    talk.ask(session.turns[2])
    assert talk.prompt == second + " Word for word!"
    prefix = TextSource(0).shared_prefix(4)
    assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert talk.messages[0]["content"] == prefix
    assert prefix + " " + talk.messages[1]["content"] == first
    assert talk.messages[2]["content"] == " I\nsee."
