"""Tokenizers that several tests share."""

from __future__ import annotations

import pytest

from minivllm.tokenizer.gguf_vocab import tokenizer_from_gguf
from minivllm.tokenizer.tokenizer import Tokenizer

from .vocabularies import sentencepiece_metadata, smollm_metadata


@pytest.fixture(scope="session")
def smollm() -> Tokenizer:
    """Byte-level BPE, no BOS."""
    return tokenizer_from_gguf(smollm_metadata())


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> Tokenizer:
    """SentencePiece BPE with byte fallback and BOS, as Llama 2's."""
    return tokenizer_from_gguf(sentencepiece_metadata())


@pytest.fixture(params=["smollm", "sentencepiece_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind."""
    loaded: Tokenizer = request.getfixturevalue(request.param)
    return loaded
