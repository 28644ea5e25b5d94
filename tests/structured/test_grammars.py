"""Making grammars, bounding them, and following them with vocabularies of every kind."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from minivllm.engine.grammar import Grammars
from minivllm.errors import InvalidRequestError
from minivllm.request import MAX_GRAMMAR_CHARS, Request, SamplingParams
from minivllm.structured import (
    MAX_SCHEMA_DEPTH,
    Vocabulary,
    check_grammar,
    compile_grammar,
    grammar_from_choice,
    grammar_from_json_schema,
    grammar_from_lark,
    grammar_from_regex,
    try_grammar,
)
from minivllm.tokenizer.gguf_vocab import tokenizer_from_gguf
from minivllm.tokenizer.tokenizer import Tokenizer
from tests.server.fakes import make_tokenizer as byte_tokenizer
from tests.tokenizer.vocabularies import llama3_metadata, sentencepiece_metadata, smollm_metadata

from .schemas import SCHEMAS

METADATA = {"smollm": smollm_metadata, "llama3": llama3_metadata, "sentencepiece": sentencepiece_metadata}
PADDING = 5


@pytest.fixture(scope="module", params=METADATA)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer_from_gguf(METADATA[request.param]())


@pytest.fixture(scope="module")
def any_grammars(any_tokenizer: Tokenizer) -> Grammars:
    """With an embedding that is larger than the vocabulary."""
    return Grammars(
        lambda: any_tokenizer,
        vocab_size=any_tokenizer.vocab_size + PADDING,
        eos_token_ids=eos_of(any_tokenizer),
    )


def eos_of(tokenizer: Tokenizer) -> list[int]:
    return sorted(tokenizer.special_token_ids)[-2:]


def follow(grammars: Grammars, tokenizer: Tokenizer, sampling: SamplingParams, rng: random.Random) -> str:
    """Random tokens that the masks allow, until an end-of-turn token; checks each mask that there is."""
    request = Request("r", [1], sampling, seed=0, max_total_tokens=10_000)
    assert sampling.grammar is not None
    request.grammar = grammars.begin(sampling.grammar)
    ends = eos_of(tokenizer)
    while True:
        pending = grammars.start_mask([request])
        assert pending is not None
        mask, errors = pending.wait()
        assert not errors
        allowed = allowed_ids(mask.bits_RB[0])
        assert not set(allowed) & (tokenizer.special_token_ids - {*ends})
        assert all(token_id < tokenizer.vocab_size for token_id in allowed)
        token_id = rng.choice(allowed)
        if token_id in ends:
            return tokenizer.join_bytes(request.token_ids[1:]).decode()
        request.token_ids.append(token_id)


def allowed_ids(bits_B: npt.NDArray[np.uint8]) -> list[int]:
    places: list[int] = np.nonzero(np.unpackbits(bits_B, bitorder="little"))[0].tolist()
    return places


def test_every_vocabulary_can_spell(any_grammars: Grammars, any_tokenizer: Tokenizer) -> None:
    """Uniformly random walks: half characters, tokens across the grammar's edges, forced text."""
    rng = random.Random(0)
    pattern = r"[a-zé你 👍]{0,9} the end/[0-9]+(\.[0-9])?"
    for _ in range(12):
        sampling = SamplingParams(max_tokens=None, grammar=grammar_from_regex(pattern))
        text = follow(any_grammars, any_tokenizer, sampling, rng)
        assert re.fullmatch(pattern, text), text
    choices = ["naïve", "naïveté 你好", " leading", "\nline\n", "👩‍👩‍👧", "<|im_end|>", "</s>", ""]
    seen = {
        follow(any_grammars, any_tokenizer, SamplingParams(grammar=grammar_from_choice(choices)), rng)
        for _ in range(60)
    }
    assert seen <= set(choices)
    assert len(seen) >= len(choices) - 2


def test_masks_equal_brute_force(any_grammars: Grammars, any_tokenizer: Tokenizer) -> None:
    """Of a language whose prefixes are easy to tell: any of these characters, at most six."""
    grammar = grammar_from_regex("[abn 1]{1,6}")
    request = Request("r", [1], SamplingParams(grammar=grammar), seed=0, max_total_tokens=100)
    request.grammar = any_grammars.begin(grammar)
    spellings = {
        token_id: any_tokenizer.token_bytes(token_id)
        for token_id in range(any_tokenizer.vocab_size)
        if token_id not in any_tokenizer.special_token_ids
    }
    rng = random.Random(1)
    room = 6
    while room:
        pending = any_grammars.start_mask([request])
        assert pending is not None
        allowed = set(allowed_ids(pending.wait()[0].bits_RB[0]))
        expected = {
            token_id
            for token_id, data in spellings.items()
            if data and len(data) <= room and set(data) <= set(b"abn 1")
        }
        assert allowed == (expected if room == 6 else expected | set(eos_of(any_tokenizer)))
        token_id = rng.choice(sorted(expected))
        request.token_ids.append(token_id)
        room -= len(spellings[token_id])


def test_named_special_tokens(any_tokenizer: Tokenizer) -> None:
    """A grammar may ask for one by name; text that spells one out is other tokens."""
    special_id = min(any_tokenizer.special_token_ids)
    name = any_tokenizer.token_to_text(special_id)
    vocabulary = vocabulary_of(any_tokenizer).build()
    if re.fullmatch(r"<[^<>]+>", name):
        by_name = compile_grammar(vocabulary, f'start: {name} "a"')
        assert allowed_ids_of(by_name.compute_bitmask()) == [special_id]
    as_text = compile_grammar(vocabulary, f"start: {json.dumps(name)}")
    assert special_id not in allowed_ids_of(as_text.compute_bitmask())


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(
        [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)],
        special_token_ids=tokenizer.special_token_ids,
        eos_token_ids=eos_of(tokenizer),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )


def allowed_ids_of(mask: bytes) -> list[int]:
    return allowed_ids(np.frombuffer(mask, dtype=np.uint8))


@pytest.mark.parametrize("has_encoder", [True, False])
def test_forced_text_is_spelled_exactly(any_tokenizer: Tokenizer, has_encoder: bool) -> None:
    """SentencePiece's own encoder would put a space before it."""
    vocabulary = vocabulary_of(any_tokenizer)
    if not has_encoder:
        vocabulary._encode = None
    for text in ["a", " a", "\nab", '{"name":', "é你👍", "\n\n", "</s>"]:
        assert any_tokenizer.join_bytes(vocabulary(text)) == text.encode()


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{2}/\w{2}",
        r"[\d/]{2}\/[\w-]{1,2}",
        r"[^\d]x?[]a/]{1,2}[^]b]",
        r"\[\d\]\\\w",
        "^(a|\\.|\n|\\\n)(?i:x)[^é]$",
    ],
)
def test_regular_expressions_are_pythons(pattern: str) -> None:
    """With a token for each byte, random walks reach what a library's own idea of a letter would add."""
    tokenizer = byte_tokenizer()
    grammars = Grammars(lambda: tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=eos_of(tokenizer))
    rng = random.Random(0)
    for _ in range(40):
        text = follow(grammars, tokenizer, SamplingParams(grammar=grammar_from_regex(pattern)), rng)
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    "pattern",
    [
        r"[\w\W]",
        r"[\d\D]",
        r"\W",
        r"\D",
        r"[^\W]",
        r"[^\D]",
        r"[\W5]",
        r"[^\W5]",
        r"[^\D\W]",
        r"[\W\d-]",
        r"\\W",
    ],
)
def test_classes_are_asciis(pattern: str) -> None:
    """And their complements; in a schema's pattern, too."""
    tokenizer = byte_tokenizer()
    vocabulary = vocabulary_of(tokenizer).build()
    of_regex = compile_grammar(vocabulary, grammar_from_regex(pattern))
    schema = {"type": "string", "pattern": f"^{pattern}$"}
    of_pattern = compile_grammar(vocabulary, grammar_from_json_schema(schema))
    for text in ["a", "Z", "_", "5", "-", " ", "é", "٣", "好", "½", "🦙", "\\W"]:
        expected = re.fullmatch(pattern, text, re.ASCII) is not None
        for grammar, written in ((of_regex, text), (of_pattern, json.dumps(text, ensure_ascii=False))):
            matcher, data = grammar.deep_copy(), [*written.encode()]
            is_accepted = matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
            assert is_accepted == expected, written


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            pytest.param(pattern, marks=pytest.mark.xfail(reason="llguidance 1.9", strict=True))
            for pattern in (r'^[^"]*$', r'^[^"\\]*$', r'^[^"a]{1,4}$', r'^[^\n"]*$')
        ),
        r'^[^"\x00-\x1f]*$',
        r'^[^"\\\x00-\x1f]{1,4}$',
    ],
)
def test_a_pattern_that_excludes_the_quote(pattern: str) -> None:
    """Only with the control characters, as docs/structured_output.md says until llguidance does better."""
    vocabulary = vocabulary_of(byte_tokenizer()).build()
    grammar = grammar_from_json_schema({"type": "string", "pattern": pattern})
    for text in ["x", 'x"', "x\\", "é"]:
        matcher, data = compile_grammar(vocabulary, grammar), [*json.dumps(text, ensure_ascii=False).encode()]
        is_accepted = matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
        assert is_accepted == (re.search(pattern, text) is not None), text


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_are_accepted(name: str) -> None:
    check_grammar(grammar_from_json_schema(SCHEMAS[name]))
    assert grammar_from_json_schema(json.dumps(SCHEMAS[name])) == grammar_from_json_schema(SCHEMAS[name])


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("make_grammar", "message"),
    [
        (lambda: grammar_from_json_schema("{"), "isn't JSON"),
        (lambda: grammar_from_json_schema("[1]"), "must be an object, got list"),
        (lambda: grammar_from_json_schema({"const": float("nan")}), "isn't JSON"),
        (lambda: grammar_from_json_schema(nested(MAX_SCHEMA_DEPTH)), f"at most {MAX_SCHEMA_DEPTH} deep"),
        (lambda: grammar_from_json_schema(nested(100_000)), "deep"),
        (lambda: grammar_from_json_schema("[" * 100_000), "deep"),
        (
            lambda: grammar_from_json_schema({"enum": ["x" * MAX_GRAMMAR_CHARS]}),
            f"at most {MAX_GRAMMAR_CHARS}",
        ),
        (lambda: grammar_from_regex("a\ud800"), "lone surrogate"),
        (lambda: grammar_from_choice([]), "at least 1 string"),
        (lambda: grammar_from_choice("yes"), "a list"),
        (lambda: grammar_from_lark(" \n"), "empty"),
    ],
)
def test_what_cannot_be_a_grammar(make_grammar: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make_grammar()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (grammar_from_json_schema(False), "schema is false"),
        (grammar_from_json_schema({"not": {"type": "string"}}), r'Unimplemented keys: \["not"\]'),
        (grammar_from_json_schema({"oneOf": [{"type": "integer"}, {"const": 5}]}), "oneOf"),
        (grammar_from_json_schema({"type": "strin"}), "Invalid type: strin"),
        (grammar_from_json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
        (grammar_from_json_schema({"$ref": "http://localhost:1/schema.json"}), "does not fetch"),
        (grammar_from_json_schema({"$ref": "#/$defs/missing"}), "missing"),
        (grammar_from_json_schema({"type": "string", "format": "haiku"}), "Unknown format: haiku"),
        (grammar_from_regex("("), "invalid regex"),
        (grammar_from_regex("(?=a)b"), "look-around"),
        (grammar_from_lark("begin: /a/"), "start"),
    ],
)
def test_grammars_that_cannot_be_used(grammar: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_grammar(grammar)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_grammar_that_cannot_be_followed_is_refused_before_it_is() -> None:
    vocabulary = vocabulary_of(tokenizer_from_gguf(smollm_metadata())).build()
    try_grammar(vocabulary, grammar_from_json_schema(SCHEMAS["formats"]))
    with pytest.raises(InvalidRequestError, match="too complex"):
        try_grammar(vocabulary, 'start: part~0..5000\npart: "a"? "b"? "c"?')
