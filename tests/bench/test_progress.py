"""The progress bar, on something that says it is a terminal."""

from __future__ import annotations

import asyncio
import io

import pytest

from minivllm_bench.load import Load
from minivllm_bench.progress import show_progress
from minivllm_bench.records import RequestRecord

from .virtual_time import run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def play(load: Load) -> None:
    """One request has ended by 0.4 s, one has failed by 0.8, the third is broken off."""
    records: list[RequestRecord] = []
    async with show_progress(records, load):
        records += [RequestRecord(n, 0, 0.0, 10) for n in range(3)]
        await asyncio.sleep(0.4)
        records[0].chunk_times += [0.1] * 20
        records[0].finished = 0.4
        records[1].chunk_times += [0.1] * 5
        await asyncio.sleep(0.4)
        records[1].finished, records[1].error = 0.8, "no"
        await asyncio.sleep(0.45)
        records[2].chunk_times += [1.1] * 5
    assert len(asyncio.all_tasks()) == 1


def test_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "200")  # where the bar cuts its line, which grows with its speed
    monkeypatch.setattr("sys.stderr", terminal)
    run(play(Load(users=1, num_requests=4)))
    shown = [line for line in terminal.getvalue().split("\r") if "under way" in line]
    for line, (done, text) in zip(
        shown,
        [
            ("1/4", "50 tokens/s, 2 under way]"),
            ("2/4", "0 tokens/s, 1 under way, 1 failed]"),
            ("2/4", "20 tokens/s, 1 under way, 1 failed]"),  # the last quarter of a second
        ],
        strict=False,
    ):
        assert f" {done} " in line
        assert text in line
    assert len(shown) >= 3


def test_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run(play(Load(users=1, duration=2)))
    assert " 1/2 s, 0 tokens/s, 1 under way, 1 failed" in terminal.getvalue()


def test_nothing_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    run(play(Load(users=1, num_requests=4)))
    assert capsys.readouterr() == ("", "")
