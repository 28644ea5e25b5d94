"""Tokenizers from GGUF metadata, against Hugging Face's parts, tiktoken's algorithm and sentencepiece."""

from __future__ import annotations

import time
import unicodedata
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from minivllm.errors import ModelLoadError
from minivllm.tokenizer.gguf_vocab import PRE_TOKENIZERS, tokenizer_from_gguf
from minivllm.tokenizer.tokenizer import Tokenizer

from .vocabularies import (
    HARD_TEXTS,
    assigned_texts,
    llama3_metadata,
    llama3_ranks,
    sentencepiece_metadata,
    sentencepiece_model,
    smollm_metadata,
    texts,
)

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def smollm_reference() -> tokenizers.Tokenizer:
    """The model's own tokenizer.json: digits one by one, then GPT-2's rules, here with the built-in parts."""
    metadata = smollm_metadata()
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(models.BPE(vocab, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reference.decoder = tokenizers.decoders.ByteLevel()
    reference.add_special_tokens(metadata["tokenizer.ggml.tokens"][:17])
    return reference


def tiktoken_encode(text: str) -> list[int]:
    """Llama 3's reference algorithm: of neighbouring parts, join the pair with the lowest rank."""
    regex = pytest.importorskip("regex")
    ranks = llama3_ranks()
    ids = []
    for piece in regex.findall(LLAMA3_PATTERN, text):
        data = piece.encode()
        parts = [data] if data in ranks else [bytes([byte]) for byte in data]
        while len(parts) > 1:
            pairs = [ranks.get(left + right, 2**31) for left, right in pairwise(parts)]
            if min(pairs) == 2**31:
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@cache
def llama3() -> Tokenizer:
    return tokenizer_from_gguf(llama3_metadata())


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_smollm_encodes_as_its_own_tokenizer(smollm: Tokenizer, text: str) -> None:
    assert smollm.encode(text) == smollm_reference().encode(text).ids


@given(assigned_texts)
def test_smollm_encodes_any_text_as_its_own_tokenizer(smollm: Tokenizer, text: str) -> None:
    ids = smollm.encode(text)
    assert ids == smollm_reference().encode(text).ids
    assert smollm.decode(ids) == smollm_reference().decode(ids)


@given(st.lists(st.integers(0, 49151), max_size=40), st.booleans())
def test_smollm_decodes_any_tokens_as_its_own_tokenizer(
    smollm: Tokenizer, token_ids: list[int], skip_special_tokens: bool
) -> None:
    expected = smollm_reference().decode(token_ids, skip_special_tokens=skip_special_tokens)
    assert smollm.decode(token_ids, skip_special_tokens=skip_special_tokens) == expected


def test_smollm_is_built_quickly_and_knows_its_special_tokens() -> None:
    def seconds() -> float:
        start = time.process_time()
        tokenizer_from_gguf(smollm_metadata())
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.5
    tokenizer = tokenizer_from_gguf(smollm_metadata())
    assert tokenizer.vocab_size == tokenizer.num_base_tokens == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.encode("<|im_start|>") == [1]
    assert 1 in tokenizer.special_token_ids
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_llama3_encodes_as_tiktoken(text: str) -> None:
    assert llama3().encode(text, add_special_tokens=False) == tiktoken_encode(text)


@given(assigned_texts)
def test_llama3_encodes_any_text_as_tiktoken(text: str) -> None:
    assert llama3().encode(text, add_special_tokens=False) == tiktoken_encode(text)


def test_llama3_splits_around_every_character_as_its_pattern_says() -> None:
    """As the ``regex`` module reads \\p{L}, \\p{N} and \\s: all that Python knows."""
    regex = pytest.importorskip("regex")
    ours = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in PRE_TOKENIZERS["llama-bpe"]]
    )
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    for start in range(0, len(known), 1000):
        text = "".join(f'a{c}"A1{c} x' for c in known[start : start + 1000])
        assert [piece for piece, _ in ours.pre_tokenize_str(text)] == regex.findall(LLAMA3_PATTERN, text)


def test_llama3_texts_begin_with_bos() -> None:
    ids = llama3().encode("<|eot_id|>")
    assert ids == [128000, 128002]
    assert llama3().decode(ids) == ""
    assert llama3().decode(ids, skip_special_tokens=False) == "<|begin_of_text|><|eot_id|>"


def test_pre_tokenizers_agree_with_transformers() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    tables = mapping.GGUF_PRE_TOKENIZER_SPLITS
    compared = set(PRE_TOKENIZERS) & set(tables)
    assert {"llama-bpe", "qwen2", "tekken"} <= compared
    for name in compared:
        theirs = pre_tokenizers.Split(tokenizers.Regex(tables[name]), "isolated")
        ours = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
        )
        for text in [*HARD_TEXTS, "CamelCaseÀÉword/path//\n/x", "日本語ABCdef123,456"]:
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), name


def test_llama3_takes_whole_words_of_its_vocabulary_before_any_merge() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 3,
    }
    for pre, expected in (("llama-bpe", [3, 2]), ("gpt-2", [0, 1])):
        assert tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": pre}).encode("ab") == expected


@pytest.mark.parametrize("name", ["gpt-2", "default"])
def test_other_pre_tokenizers_lose_nothing(name: str) -> None:
    tokenizer = tokenizer_from_gguf(smollm_metadata() | {"tokenizer.ggml.pre": name})
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_gpt2_splits_as_the_built_in_byte_level() -> None:
    vocabulary = smollm_metadata() | {"tokenizer.ggml.pre": "gpt-2"}
    ours = tokenizer_from_gguf(vocabulary)
    reference = tokenizers.Tokenizer(smollm_reference().model)
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in HARD_TEXTS:
        if "<|" not in text:
            assert ours.encode(text) == reference.encode(text).ids


@given(texts)
def test_sentencepiece_encodes_and_decodes_as_sentencepiece(
    sentencepiece_tokenizer: Tokenizer, text: str
) -> None:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=sentencepiece_model())
    ids = sentencepiece_tokenizer.encode(text)
    assert ids == [processor.bos_id(), *processor.encode(text)]
    assert sentencepiece_tokenizer.decode(ids) == processor.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_prefix_space_is_a_setting() -> None:
    flags = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    without = tokenizer_from_gguf(sentencepiece_metadata(add_dummy_prefix=False) | flags)
    model = sentencepiece_model(add_dummy_prefix=False)
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    for text in [" a", *HARD_TEXTS]:
        if "<s>" not in text:  # a special token here, four characters there
            ids = without.encode(text)
            assert ids == processor.encode(text)
            assert without.decode(ids) == processor.decode(ids)
    assert without.decode(without.encode(" a")) == " a"


@pytest.mark.parametrize("text", ["a☃☃☃b", "☃", "☃ ☃☃", "好☃ naïve ☃é"])
def test_sentencepiece_without_bytes_has_one_token_for_a_run_of_unknown_characters(text: str) -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(byte_fallback=False))
    model = sentencepiece_model(byte_fallback=False)
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    ids = tokenizer.encode(text)
    assert processor.unk_id() in ids
    assert ids == [processor.bos_id(), *processor.encode(text)]


def test_sentencepiece_special_tokens_stay_whole(sentencepiece_tokenizer: Tokenizer) -> None:
    assert (sentencepiece_tokenizer.bos_token, sentencepiece_tokenizer.eos_token) == ("<s>", "</s>")
    ids = sentencepiece_tokenizer.encode("<s>a</s>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (1, 2)
    assert sentencepiece_tokenizer.decode(ids) == "a"


def test_tokens_added_around_a_text() -> None:
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = tokenizer_from_gguf(smollm_metadata() | both)
    plain = tokenizer.encode("x", add_special_tokens=False)
    assert tokenizer.encode("x") == [1, *plain, 2]
    only_eos = {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.bos_token_id": 2**32 - 1}
    tokenizer = tokenizer_from_gguf(smollm_metadata() | only_eos)
    assert tokenizer.encode("x") == [*plain, 2]
    assert tokenizer.bos_token is None


def test_user_defined_tokens_are_matched_whole_and_shown() -> None:
    metadata = dict(smollm_metadata())
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think é>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("a<think é>b")[1] == 49152
    assert tokenizer.decode([49152]) == "<think é>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, r"tokenizer\.ggml\.pre is 'klingon'.*known are .*smollm"),
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model must be gpt2 or llama, got 'bert'"),
        ({"tokenizer.ggml.model": 7}, r"tokenizer\.ggml\.model must be str, got 7"),
        ({"tokenizer.ggml.tokens": ["a", 1]}, r"tokenizer\.ggml\.tokens must hold str only"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"], "tokenizer.ggml.token_type": [1, 1, 1]}, "'a' twice"),
        ({"tokenizer.ggml.token_type": [1, 1]}, r"one entry for each of the 49152 tokens, got 2"),
        ({"tokenizer.ggml.merges": ["ab"]}, r"must hold pairs, got 'ab'"),
        ({"tokenizer.ggml.merges": ["a b c"]}, r"must hold pairs, got 'a b c'"),
        ({"tokenizer.ggml.merges": ["Ġ ☃"]}, "the vocabulary can't be used"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 10**6},
            r"bos_token_id names none",
        ),
    ],
)
def test_malformed_metadata_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        tokenizer_from_gguf(smollm_metadata() | changes)


@pytest.mark.parametrize("key", ["tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"])
def test_missing_metadata_is_named(key: str) -> None:
    metadata = {name: value for name, value in smollm_metadata().items() if name != key}
    with pytest.raises(ModelLoadError, match=f"{key} is missing"):
        tokenizer_from_gguf(metadata)


def test_sentencepiece_needs_a_score_for_each_token() -> None:
    with pytest.raises(
        ModelLoadError, match=r"scores must have one entry for each of the 1200 tokens, got 1"
    ):
        tokenizer_from_gguf(sentencepiece_metadata() | {"tokenizer.ggml.scores": [0.0]})
