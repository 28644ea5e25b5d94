"""Workloads in files."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from minivllm.errors import ConfigError
from minivllm_bench.jsonl import find_workload, read_sessions
from minivllm_bench.workloads import WORKLOADS, Session, Turn

GOOD = """
{"prompt": "What is a whale?", "output_tokens": 20, "id": 7}

{"prompt_tokens": 300, "max_tokens": 5}
{"prompt": "Twelve bytes", "prompt_tokens": 99, "output_tokens": 1}
{"turns": [{"prompt": "Hi", "max_tokens": 3}, {"prompt_tokens": 8, "max_tokens": 4}]}
"""
SESSIONS = [
    Session((Turn(5, 20, "What is a whale?"),)),
    Session((Turn(300, 5),)),
    Session((Turn(99, 1, "Twelve bytes"),)),
    Session((Turn(1, 3, "Hi"), Turn(8, 4))),
]


def test_every_kind_of_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    assert read_sessions(path) == SESSIONS
    path.write_bytes(GOOD.replace("\n", "\r\n").encode())
    assert read_sessions(path) == SESSIONS


def test_it_starts_again_after_the_last(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    workload, num_requests = find_workload(str(path))
    assert num_requests == 5
    assert list(itertools.islice(workload(random.Random(0)), 6)) == [*SESSIONS, *SESSIONS[:2]]


def test_a_name_is_a_name() -> None:
    assert find_workload("agent") == (WORKLOADS["agent"], None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "Input data was truncated"),
        (b"hello", "JSON is malformed"),
        (b'"hello"', "Expected `object`, got `str`"),
        (b'{"prompt": "a"}', '"output_tokens" (or "max_tokens") is missing'),
        (b'{"output_tokens": 5}', '"prompt" (a text) or "prompt_tokens" (a number) is missing'),
        (b'{"prompt": 5, "output_tokens": 5}', "Expected `str | null`, got `int` - at `$.prompt`"),
        (b'{"prompt": "", "output_tokens": 5}', "Expected `str` of length >= 1 - at `$.prompt`"),
        (b'{"prompt": "a", "output_tokens": 0}', "Expected `int` >= 1 - at `$.output_tokens`"),
        (b'{"prompt": "a", "output_tokens": true}', "got `bool` - at `$.output_tokens`"),
        (b'{"prompt_tokens": 2.5, "output_tokens": 1}', "got `float` - at `$.prompt_tokens`"),
        (b'{"turns": []}', "Expected `array` of length >= 1 - at `$.turns`"),
        (b'{"turns": [{"prompt": "a", "max_tokens": 1}, {"prompt": "a"}]}', "is missing - at `$.turns[1]`"),
        (b'{"turns": [{"prompt": "a", "max_tokens": 1}], "prompt": "b"}', 'give "turns", or a prompt'),
        (b'{"prompt": "\xff", "output_tokens": 1}', "utf-8"),
    ],
)
def test_a_wrong_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a", "max_tokens": 1}\n\n' + line + b"\n")
    with pytest.raises(ConfigError) as error:
        read_sessions(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        find_workload(str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match=r"fixed, .* or a \.jsonl file, got 'fixd'"):
        find_workload("fixd")
    with pytest.raises(ConfigError, match="Is a directory"):
        find_workload(str(tmp_path))
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match="has no lines"):
        find_workload(str(tmp_path / "a.jsonl"))
