"""How the strings in a vocabulary spell bytes.

Two spellings are in use. *Byte-level* (GPT-2, Llama 3) writes each byte as one printable character,
so that ``Ġ`` is a space and half a character is a token like any other. *SentencePiece* (Llama 2)
writes text as it is, with ``▁`` for a space, and falls back to tokens such as ``<0xE2>`` for the
bytes of characters that aren't in the vocabulary. Either way a token stands for a fixed run of
bytes, and the text of many tokens is their bytes, joined and read as UTF-8.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from minivllm.errors import ModelLoadError

SPACE = "▁"
"""SentencePiece's space."""

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_CHAR_TO_BYTE = {chr(byte): byte for byte in _PRINTABLE}
_CHAR_TO_BYTE |= {chr(256 + rank): byte for rank, byte in enumerate(_OTHERS)}
BYTE_TO_CHAR = {byte: char for char, byte in sorted(_CHAR_TO_BYTE.items(), key=lambda pair: pair[1])}
"""GPT-2's alphabet, from byte 0 on: printable Latin-1 stands for itself, the rest is moved above U+0100."""

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Alphabet:
    """One vocabulary's spelling."""

    is_byte_level: bool
    has_byte_tokens: bool = False
    """``<0xE2>`` stands for a byte."""
    strips_leading_space: bool = False
    """One space at the very start of a text isn't shown: encoding had put it there."""

    def to_bytes(self, token: str) -> bytes:
        """The bytes that a vocabulary's string stands for."""
        if self.is_byte_level:
            # A character outside the alphabet means that this is plain text, which some added tokens are.
            if all(char in _CHAR_TO_BYTE for char in token):
                return bytes(_CHAR_TO_BYTE[char] for char in token)
            return token.encode()
        if self.has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace(SPACE, " ").encode()


def read_alphabet(backend: Tokenizer) -> Alphabet:
    """The spelling that a tokenizer's decoder undoes.

    Raises :class:`ModelLoadError` where the text of a token depends on its neighbours in another
    way (WordPiece's ``##``, say): no Llama-family vocabulary does that.
    """
    if backend.decoder is None:
        raise ModelLoadError("the tokenizer has no decoder")
    steps = _flatten(json.loads(backend.decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Alphabet(is_byte_level=True)
    has_byte_tokens = strips_leading_space = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "} | {"type": "Fuse"}:
                pass
            case {"type": "ByteFallback"}:
                has_byte_tokens = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                strips_leading_space = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                strips_leading_space = scheme != "never"
            case _:
                raise ModelLoadError(
                    f"the tokenizer's decoder is {' + '.join(kinds)}; supported are ByteLevel, and "
                    f"SentencePiece's steps (Replace {SPACE}, ByteFallback, Fuse, Strip, Metaspace)"
                )
    return Alphabet(
        is_byte_level=False, has_byte_tokens=has_byte_tokens, strips_leading_space=strips_leading_space
    )


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flatten(part)]
