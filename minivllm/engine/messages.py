"""What the server and the engine process say to each other: typed msgpack, never pickle."""

from __future__ import annotations

import msgspec

from minivllm.request import EngineEvent, EngineInfo, EngineStats, SamplingParams


class AddRequest(msgspec.Struct, tag=True):
    """Client → engine: a checked request."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    client_id: str | None = None


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


ToEngine = AddRequest | AbortRequest
FromEngine = Ready | StartFailed | StepEvents

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
