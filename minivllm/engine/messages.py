"""What the server and the engine process say to each other: typed msgpack, never pickle.

A message that can't be read ends the engine process: both sides come from one package, so it means that their
versions differ, and any answer would be a guess.
"""

from __future__ import annotations

import msgspec

from minivllm.engine.steps import StepRecord
from minivllm.errors import MessageError
from minivllm.request import EngineEvent, EngineInfo, EngineStats, SamplingParams, Terms


class AddRequest(msgspec.Struct, tag=True):
    """Client → engine: a checked request."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    terms: Terms


class AbortRequest(msgspec.Struct, tag=True):
    """Client → engine: nobody waits for this request any more."""

    request_id: str


class Ready(msgspec.Struct, tag=True):
    """Engine → client, first: it can serve."""

    info: EngineInfo
    stats: EngineStats


class StartFailed(msgspec.Struct, tag=True):
    """Engine → client, instead of :class:`Ready`."""

    message: str


class StepEvents(msgspec.Struct, tag=True):
    """Engine → client, after each step."""

    events: list[EngineEvent]
    stats: EngineStats
    records: list[StepRecord] = []
    """Of steps that ended since the last message, where --debug-routes asks for them."""


ToEngine = AddRequest | AbortRequest
FromEngine = Ready | StartFailed | StepEvents

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

encode = msgspec.msgpack.Encoder().encode
_decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
_decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def decode_to_engine(frame: bytes) -> ToEngine:
    """What the client says. Raises :class:`MessageError`."""
    try:
        message: ToEngine = _decode_to_engine(frame)
    except _UNREADABLE as error:
        raise MessageError(f"the server sent what is no message: {error}") from None
    return message


def decode_from_engine(frame: bytes) -> FromEngine:
    """What the engine process says. Raises :class:`MessageError`."""
    try:
        message: FromEngine = _decode_from_engine(frame)
    except _UNREADABLE as error:
        raise MessageError(f"the engine process sent what is no message: {error}") from None
    return message
