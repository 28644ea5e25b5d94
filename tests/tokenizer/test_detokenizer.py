"""Incremental detokenization against decoding in one go."""

from __future__ import annotations

import pickle
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.tokenizer.detokenizer import IncrementalDetokenizer
from minivllm.tokenizer.load import _byte_tokenizer
from minivllm.tokenizer.tokenizer import Tokenizer

from .vocabularies import texts

BYTES = _byte_tokenizer(256)
"""Token i is byte i: the smallest pieces there are, and any broken UTF-8."""

cuts = st.lists(st.integers(0, 12), max_size=20)


def push_all(tokenizer: Tokenizer, prompt: list[int], output: list[int], cuts: list[int]) -> list[str]:
    """What each push returns where the output comes in chunks of these sizes, then the flush."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    edges = [0, *(edge for edge in accumulate(cuts) if edge < len(output)), len(output)]
    shown = [detokenizer.push(output[a:b]) for a, b in pairwise(edges)]
    return [*shown, detokenizer.flush()]


@given(st.binary(max_size=40), cuts)
def test_any_bytes_in_any_chunks_decode_as_in_one_go(data: bytes, cuts: list[int]) -> None:
    assert "".join(push_all(BYTES, [], list(data), cuts)) == data.decode(errors="replace")


@given(st.lists(st.integers(0, 49151), max_size=40), cuts)
def test_any_byte_level_tokens_decode_as_in_one_go(
    smollm: Tokenizer, token_ids: list[int], cuts: list[int]
) -> None:
    assert "".join(push_all(smollm, [], token_ids, cuts)) == smollm.decode(token_ids)


@given(st.lists(st.one_of(st.integers(0, 1199), st.integers(3, 258)), max_size=40), cuts)
def test_any_sentencepiece_tokens_decode_as_in_one_go(
    sentencepiece_tokenizer: Tokenizer, token_ids: list[int], cuts: list[int]
) -> None:
    # Ids 3 to 258 are single bytes.
    shown = push_all(sentencepiece_tokenizer, [1], token_ids, cuts)
    assert "".join(shown) == sentencepiece_tokenizer.decode(token_ids)


@given(prompt=texts, output=texts, cuts=cuts)
def test_the_output_continues_the_prompt(
    smollm: Tokenizer, sentencepiece_tokenizer: Tokenizer, prompt: str, output: str, cuts: list[int]
) -> None:
    for tokenizer in (smollm, sentencepiece_tokenizer):
        prompt_ids = tokenizer.encode(prompt)
        output_ids = tokenizer.encode(output, add_special_tokens=False)
        shown = push_all(tokenizer, prompt_ids, output_ids, cuts)
        assert tokenizer.decode(prompt_ids) + "".join(shown) == tokenizer.decode(prompt_ids + output_ids)


@given(text=st.text(max_size=20), cut=st.integers(0, 80))
def test_no_half_character_is_ever_shown(text: str, cut: int) -> None:
    data = text.encode()
    detokenizer = IncrementalDetokenizer(BYTES, data[:cut])
    # The character that the prompt breaks off is the output's first.
    shown = data[:cut].decode(errors="ignore")
    for end in range(cut + 1, len(data) + 1):
        shown += detokenizer.push([data[end - 1]])
        assert shown == data[:end].decode(errors="ignore")
    assert detokenizer.flush() == ("" if shown == text else "\ufffd")


def test_a_character_appears_when_it_is_complete() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, [])
    assert [detokenizer.push([byte]) for byte in "é👍a".encode()] == ["", "é", "", "", "", "👍", "a"]


def test_broken_bytes_appear_as_soon_as_they_cannot_become_a_character() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, [])
    shown = [detokenizer.push([byte]) for byte in b"\x80\x80\xf0\x9f\xf0\x9f\x91a\xe2\x82"]
    assert shown == ["\ufffd", "\ufffd", "", "", "\ufffd", "", "", "\ufffda", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_sentencepiece_hides_its_own_leading_space_only(sentencepiece_tokenizer: Tokenizer) -> None:
    encode = sentencepiece_tokenizer.encode
    the = encode("the", add_special_tokens=False)
    assert sentencepiece_tokenizer.token_bytes(the[0]).startswith(b" ")
    for prompt, expected in ((encode(""), "the"), (encode("x"), " the"), ([], "the"), ([2, 1, 1], "the")):
        assert "".join(push_all(sentencepiece_tokenizer, prompt, the, [])) == expected
        assert "".join(push_all(sentencepiece_tokenizer, prompt, [2, *the], [1])) == expected


@pytest.mark.parametrize("token", [ord("a"), 0x80, 0xF0])
def test_a_token_costs_the_same_however_long_the_output(token: int) -> None:
    """Nothing is kept that a later token could have to go through."""

    def kept_after(num_tokens: int) -> int:
        detokenizer = IncrementalDetokenizer(BYTES, [])
        for _ in range(num_tokens):
            detokenizer.push([token])
        return len(pickle.dumps({**vars(detokenizer), "_tokenizer": None}))

    assert kept_after(10_000) == kept_after(10)
