"""Real vocabularies to test with, and texts that are hard to tokenize."""

from __future__ import annotations

import base64
import importlib.util
import inspect
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from minivllm.tokenizer.alphabet import BYTE_TO_CHAR
from minivllm.weights.embedded import embedded_model_path
from minivllm.weights.gguf import open_gguf

HARD_TEXTS = [
    "",
    " ",
    "   ",
    "Hello, world!  Two spaces, then\ttab\n\n\nand lines.\r\n",
    "We'll see: I'm, you're, they've, it's, DON'T, WE'LL, 'ſ",
    "1 12 123 1234 12345  67 ٣٤٥ ½ ² Ⅷ 3.14e-10",
    "def f(x):\n    return x ** 2  # ¿por qué?\n",
    "naïve café — “quotes” … 你好，世界 こんにちは 안녕 Привет עברית हिन्दी",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 e\u0301 \u200b\u00a0\u3000\u0085 \ufffd 𝕏",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>",
    "<s>[INST] hi [/INST]</s>",
    "\x00\x01\x7f ▁under▁score▁ Ġ Ċ",
]

_special_runs = st.lists(
    st.sampled_from(["a", " ", "  ", "\n", "12", "'s", "é", "好", "👍", "the", "=", "▁"])
).map("".join)

texts = st.one_of(st.text(max_size=60), _special_runs)
"""Random Unicode without surrogates, and random runs of what pre-tokenizers treat specially."""

assigned_texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60), _special_runs
)
"""``texts`` of characters that Python knows, to compare libraries with Unicode tables of their own.

A character of a newer Unicode version is a letter to one of them and nothing yet to another.
"""


@cache
def smollm_metadata() -> dict[str, Any]:
    """Of the embedded model's GGUF file."""
    metadata = open_gguf(embedded_model_path()).metadata
    return {key: metadata[key] for key in metadata if key.startswith("tokenizer.")}


@cache
def llama3_ranks() -> dict[bytes, int]:
    """Llama 3's vocabulary, as Meta ships it: bytes to rank."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama_models isn't installed: pip install --no-deps llama-models==0.3.0")
    path = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


@cache
def llama3_metadata() -> dict[str, Any]:
    """Llama 3's vocabulary as a GGUF file has it, with a few of its special tokens."""
    ranks = llama3_ranks()
    spelled = {token: "".join(BYTE_TO_CHAR[byte] for byte in token) for token in ranks}
    merges = [
        (rank, ranks[token[:cut]], f"{spelled[token[:cut]]} {spelled[token[cut:]]}")
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    special_tokens = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*spelled.values(), *special_tokens],
        "tokenizer.ggml.token_type": [1] * len(ranks) + [3] * len(special_tokens),
        "tokenizer.ggml.merges": [merge for _, _, merge in sorted(merges)],
        "tokenizer.ggml.bos_token_id": len(ranks),
        "tokenizer.ggml.eos_token_id": len(ranks) + 1,
    }


@cache
def sentencepiece_model(**options: Any) -> bytes:
    """A small SentencePiece model with Llama 2's settings, trained here."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = inspect.getsource(json).splitlines() + inspect.getsource(inspect).splitlines()
    lines += ["naïve café, 你好世界 русский текст"] * 20
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 1200,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    trainer.train(sentence_iterator=iter(lines), model_writer=model, **settings | options)
    return model.getvalue()


@cache
def sentencepiece_metadata(**options: Any) -> dict[str, Any]:
    """:func:`sentencepiece_model` as a GGUF file has it."""
    model = sentencepiece_model(**options)
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())

    def token_type(i: int) -> int:
        return (
            2
            if processor.is_unknown(i)
            else 3
            if processor.is_control(i)
            else 6
            if processor.is_byte(i)
            else 1
        )

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [token_type(i) for i in ids],
    }
