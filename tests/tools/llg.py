"""llguidance over bytes, one token each."""

from __future__ import annotations

import random

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


class _Bytes:
    eos_token_id, bos_token_id = 256, None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<eos>"]  # noqa: RUF012
    special_token_ids = [256]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


_TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def accepts(grammar: str, text: str) -> bool:
    """Whether ``text`` is a whole answer of ``grammar``."""
    matcher = LLMatcher(_TOKENIZER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def write_at_random(grammar: str, rng: random.Random, max_bytes: int = 400) -> str | None:
    """An answer that ``rng`` writes byte by byte; None if it has no end by then."""
    matcher = LLMatcher(_TOKENIZER, grammar, log_level=0)
    data = bytearray()
    while len(data) < max_bytes:
        mask = matcher.compute_logit_bias()
        allowed = [byte for byte in range(257) if mask[byte]]
        # Mostly printable ASCII, so that strings end some day and are readable; quotes more often.
        good = [b for b in allowed if 32 <= b < 127 or b == 256] or allowed
        likely = [b for b in good if b in (*b'"}],)', 256)]
        byte = rng.choice(likely if likely and rng.random() < 0.5 else good)
        if byte == 256:
            return data.decode()
        assert matcher.consume_token(byte)
        data.append(byte)
        if matcher.is_stopped():
            return data.decode()
    return None
