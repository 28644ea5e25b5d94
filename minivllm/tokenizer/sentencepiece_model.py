"""SentencePiece's ``tokenizer.model`` (Llama 2), read without the sentencepiece library.

The file is a protocol buffer, described in
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. A dozen of its
fields are all that a tokenizer takes, and the wire format is simple: numbered fields, each a
number or a run of bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import tokenizers

from minivllm.errors import ModelLoadError
from minivllm.tokenizer.bpe import TokenType, mark_added_tokens, sentencepiece_bpe

_BPE = 2  # TrainerSpec.ModelType


class NotSentencePieceError(ValueError):
    """The bytes aren't a SentencePiece model (Llama 3 has a ``tokenizer.model`` of another kind)."""


@dataclass(slots=True)
class SentencePieceModel:
    """What a file says; the values here are the format's defaults."""

    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = 1
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    treats_space_as_suffix: bool = False
    has_char_map: bool = False
    """Text is normalized (NFKC and the like) before it is cut."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def is_plain_bpe(self) -> bool:
        """Whether text reaches the merges unchanged, as in every Llama vocabulary."""
        changes_text = self.has_char_map or self.remove_extra_whitespaces or self.treats_space_as_suffix
        return self.model_type == _BPE and self.escape_whitespaces and not changes_text

    @property
    def special_tokens(self) -> dict[str, str]:
        """Unknown, begin and end token by their template names; an id of -1 means that there is none."""
        named = {"unk_token": self.unk_id, "bos_token": self.bos_id, "eos_token": self.eos_id}
        return {name: self.tokens[i] for name, i in named.items() if 0 <= i < len(self.tokens)}

    def to_tokenizer(self) -> tokenizers.Tokenizer:
        """The same tokenizer for the ``tokenizers`` library. Only for a plain BPE model.

        Raises :class:`ModelLoadError` where the vocabulary contradicts itself.
        """
        if "unk_token" not in self.special_tokens:
            raise ModelLoadError(f"the vocabulary has no unknown token (id {self.unk_id})")
        backend = sentencepiece_bpe(
            self.tokens,
            self.scores,
            self.types,
            unk_token=self.special_tokens["unk_token"],
            add_space_prefix=self.add_dummy_prefix,
        )
        mark_added_tokens(backend, self.tokens, self.types)
        return backend


def parse_sentencepiece_model(data: bytes) -> SentencePieceModel:
    """Read a serialised model. Raises :class:`NotSentencePieceError`."""
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            match number, value:
                case 1, bytes(piece):
                    _parse_piece(model, piece)
                case 2, bytes(trainer):
                    _parse_trainer(model, trainer)
                case 3, bytes(normalizer):
                    _parse_normalizer(model, normalizer)
    except (IndexError, ValueError, struct.error) as error:
        raise NotSentencePieceError(f"not a SentencePiece model: {error}") from None
    if not model.tokens:
        raise NotSentencePieceError("not a SentencePiece model: it has no pieces")
    return model


def _parse_piece(model: SentencePieceModel, data: bytes) -> None:
    token, score, token_type = "", 0.0, int(TokenType.NORMAL)
    for number, value in _fields(data):
        match number, value:
            case 1, bytes(text):
                token = text.decode()
            case 2, bytes(packed):
                (score,) = struct.unpack("<f", packed)
            case 3, int(code):
                token_type = code
    model.tokens.append(token)
    model.scores.append(score)
    model.types.append(token_type)


def _parse_trainer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        match number, value:
            case 3, int(code):
                model.model_type = code
            case 24, int(flag):
                model.treats_space_as_suffix = bool(flag)
            case 40, int(token_id):
                model.unk_id = token_id
            case 41, int(token_id):
                model.bos_id = token_id
            case 42, int(token_id):
                model.eos_id = token_id


def _parse_normalizer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        match number, value:
            case 2, bytes(char_map):
                model.has_char_map = bool(char_map)
            case 3, int(flag):
                model.add_dummy_prefix = bool(flag)
            case 4, int(flag):
                model.remove_extra_whitespaces = bool(flag)
            case 5, int(flag):
                model.escape_whitespaces = bool(flag)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """A message's fields: number, and a signed integer or the raw bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield number, value - 2**64 if value >= 2**63 else value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if size > len(data) - position:
            raise ValueError(f"{size} bytes are needed at byte {position}, but it has {len(data)}")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"an integer before byte {position} has more than 64 bits")
