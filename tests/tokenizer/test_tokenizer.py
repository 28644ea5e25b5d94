"""Encoding, decoding and the bytes of single tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from minivllm.errors import ContextLengthError, InvalidRequestError, ModelLoadError
from minivllm.tokenizer.tokenizer import Tokenizer

from .vocabularies import HARD_TEXTS, texts


@given(text=texts)
def test_the_bytes_of_tokens_are_the_text(sentencepiece_tokenizer: Tokenizer, text: str) -> None:
    ids = sentencepiece_tokenizer.encode(text, add_special_tokens=False)
    shown = b"".join(sentencepiece_tokenizer.token_bytes(i) for i in ids)
    assert shown == (" " + text.replace("▁", " ") if text else "").encode()


@pytest.mark.parametrize("text", [text for text in HARD_TEXTS if "\x00" not in text])
def test_a_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.strips_leading_space:  # SentencePiece: spaces are ▁, and one more follows a special token
        text = text.replace("▁", " ").replace("<s>", "<s> ")
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_token_may_be_half_a_character(smollm: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    for tokenizer in (smollm, sentencepiece_tokenizer):
        ids = tokenizer.encode("👍", add_special_tokens=False)
        pieces = [tokenizer.token_bytes(i) for i in ids]
        assert b"".join(pieces).strip() == "👍".encode()
        assert max(len(piece) for piece in pieces) < 4
        assert "\ufffd" in tokenizer.token_to_text(ids[-1])


def test_special_tokens_are_their_text(tokenizer: Tokenizer) -> None:
    for token_id in tokenizer.special_token_ids:
        text = tokenizer.token_to_text(token_id)
        assert tokenizer.encode(text, add_special_tokens=False) == [token_id]
        assert tokenizer.decode([token_id]) == ""
        assert tokenizer.decode([token_id], skip_special_tokens=False) == text


def test_added_tokens_are_plain_text_in_a_byte_level_vocabulary() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"Ġ": 0, "Ã": 1, "©": 2}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["é", "Ġ"])
    tokenizer = Tokenizer(backend, special_tokens={})
    assert [tokenizer.token_bytes(i) for i in range(4)] == [b"\xc4\xa0", b"\xc3", b"\xa9", "é".encode()]
    assert tokenizer.decode([1, 2, 3]) == "éé"


def test_what_no_tokens_can_hold_is_refused_unread(tokenizer: Tokenizer) -> None:
    longest = max(range(tokenizer.vocab_size), key=lambda token_id: len(tokenizer.token_bytes(token_id)))
    size = tokenizer.longest_token
    assert size == len(tokenizer.token_bytes(longest))
    text = "x" * (5 * size)
    assert tokenizer.encode(text, max_tokens=5) == tokenizer.encode(text)
    with pytest.raises(
        ContextLengthError, match=rf"5 tokens of at most {size} bytes.* has {5 * size + 1} bytes"
    ):
        tokenizer.encode(text + "x", max_tokens=5)


def test_of_a_large_text_no_more_is_read_than_shows_that_it_is_too_long(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minivllm.tokenizer.tokenizer._MANY_CHARS", 1000)
    text = "1, 2; " * 1000
    num_tokens = len(tokenizer.encode(text))
    for fitting in (num_tokens, num_tokens // 2):  # a beginning has less than all
        assert tokenizer.encode(text, max_tokens=fitting) == tokenizer.encode(text)
    few = len(tokenizer.encode(text[:2000])) // 2 - 1
    with pytest.raises(
        ContextLengthError, match=rf"{few} tokens, but the first 2000 of the prompt's 6000 char"
    ):
        tokenizer.encode(text, max_tokens=few)
    with pytest.raises(ContextLengthError, match="but the first 1000 of"):
        tokenizer.encode(text, max_tokens=len(tokenizer.encode(text[:1000])) // 2 - 1)


@pytest.mark.parametrize("text", ["\ud800", "abc\udfff", "😀\ud83d"])
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, text: str) -> None:
    position = len(text) - 1
    with pytest.raises(InvalidRequestError, match=rf"character {position} is a lone surrogate \(U\+D"):
        tokenizer.encode(text)


def test_unknown_ids_show_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == ""


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**70])
def test_impossible_ids_are_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"token ids must be from 0 to .*, got {token_id}"):
        tokenizer.decode([token_id])


@given(st.lists(st.integers(0, 1199), max_size=30))
def test_sentencepiece_decodes_valid_text_as_tokenizers_does(
    sentencepiece_tokenizer: Tokenizer, token_ids: list[int]
) -> None:
    # Where bytes aren't UTF-8 they differ in how many U+FFFD stand for them: one for each broken
    # character here, one for each byte there.
    decoded = sentencepiece_tokenizer.decode(token_ids)
    if "\ufffd" not in decoded:
        assert decoded == sentencepiece_tokenizer._backend.decode(token_ids)


def test_a_decoder_that_looks_at_neighbours_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    with pytest.raises(ModelLoadError, match="has no decoder"):
        Tokenizer(backend, special_tokens={})
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelLoadError, match="decoder is WordPiece; supported are ByteLevel"):
        Tokenizer(backend, special_tokens={})


@pytest.mark.parametrize("prepend_scheme", ["always", "never"])
def test_metaspace_decoders(prepend_scheme: str) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"▁": 0, "▁a": 1, "b": 2, "<0x41>": 3}, []))
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer = Tokenizer(backend, special_tokens={})
    for ids in ([1, 2, 1], [2, 1], [0, 1], [1, 0, 0], [2, 3]):
        assert tokenizer.decode(ids) == backend.decode(ids)


def test_threads_may_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    expected = [tokenizer.encode(text) for text in HARD_TEXTS]
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(tokenizer.encode, HARD_TEXTS * 20))
        decoded = list(pool.map(tokenizer.decode, expected * 20))
    assert encoded == expected * 20
    assert decoded == [tokenizer.decode(ids) for ids in expected] * 20
