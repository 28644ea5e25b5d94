"""Workloads of the user's own: a JSON object a line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from minivllm.errors import ConfigError
from minivllm_bench.workloads import WORKLOADS, Session, Turn, Workload

_Count = Annotated[int, msgspec.Meta(ge=1)]
_BYTES_PER_TOKEN = 4  # of English, by rule of thumb


class _Turn(msgspec.Struct):
    prompt: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    prompt_tokens: _Count | None = None
    output_tokens: _Count | None = None
    max_tokens: _Count | None = None


class _Line(_Turn):
    turns: Annotated[list[_Turn], msgspec.Meta(min_length=1)] | None = None


def read_sessions(path: Path) -> list[Session]:
    """The sessions in a file, one a line.

    A line is a turn: ``prompt``, a text that is sent word for word, or ``prompt_tokens``, for which words are
    made up (with both, the text is sent and the number is what it is expected to have); and ``output_tokens``
    or ``max_tokens``. Or it has ``turns``, a list of such objects: a chat, of which each turn sends all that
    was said before. Other fields are left alone, and so are empty lines.

    Raises:
        ConfigError: the file can't be read, or has a line that is none of these; the message names it.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"can't read the workload {path}: {error.strerror}") from None
    sessions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sessions.append(_session(msgspec.json.decode(line, type=_Line)))
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    if not sessions:
        raise ConfigError(f"the workload {path} has no lines")
    return sessions


def find_workload(name: str) -> tuple[Workload, int | None]:
    """A workload by its name or its file, and of a file how many requests it has.

    Raises:
        ConfigError: there is neither, or the file is malformed.
    """
    if name in WORKLOADS:
        return WORKLOADS[name], None
    if not name.endswith(".jsonl") and not Path(name).exists():
        raise ConfigError(f"--workload must be one of {', '.join(WORKLOADS)} or a .jsonl file, got {name!r}")
    sessions = read_sessions(Path(name))
    return replay(sessions), sum(len(session.turns) for session in sessions)


def replay(sessions: list[Session]) -> Workload:
    """They, one after the other, and from the start again after the last."""

    def workload(rng: random.Random) -> Iterator[Session]:
        return itertools.cycle(sessions)

    return workload


def _session(line: _Line) -> Session:
    if line.turns is None:
        return Session((_turn(line, ""),))
    if line.prompt is not None or line.prompt_tokens is not None:
        raise ValueError('give "turns", or a prompt, not both')
    return Session(tuple(_turn(turn, f" - at `$.turns[{i}]`") for i, turn in enumerate(line.turns)))


def _turn(turn: _Turn, place: str) -> Turn:
    output_tokens = turn.output_tokens or turn.max_tokens
    if output_tokens is None:
        raise ValueError(f'"output_tokens" (or "max_tokens") is missing{place}')
    if turn.prompt is None and turn.prompt_tokens is None:
        raise ValueError(f'"prompt" (a text) or "prompt_tokens" (a number) is missing{place}')
    estimate = len((turn.prompt or "").encode()) // _BYTES_PER_TOKEN + 1
    return Turn(turn.prompt_tokens or estimate, output_tokens, turn.prompt)
