"""``minivllm bench compare`` as somebody calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minivllm import cli
from minivllm_bench import compare, results
from minivllm_bench.results import Comparison, Point
from tests.bench.fake_server import FakeServer, Reply, answer, served


def compared(folder: Path, *flags: str) -> tuple[int, Comparison]:
    """The exit code, and what was written."""
    code = cli.main(["bench", "compare", "--output", str(folder / "new" / "out"), *flags])
    return code, results.load(folder / "new" / "out" / "compare.json")


@pytest.fixture(autouse=True)
def _idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cares here whether the machine is."""
    monkeypatch.setattr("minivllm_bench.machine.busy_processes", dict)


def test_a_mode_and_a_peer_end_in_a_report(tmp_path: Path) -> None:
    with served(FakeServer()) as url:
        code, comparison = compared(
            tmp_path, "--modes", "paged", "--url", f"fake={url}", "--users", "1,2", "--seconds", "0.7",
            "--agent-steps", "1", "--agent-users", "1", "--kv-cache-memory", "128MiB", "--minutes", "3",
        )  # fmt: skip
    assert code == 0
    assert comparison["is_complete"]
    assert comparison["model"] == "SmolLM2-135M-Instruct"
    paged, fake = comparison["contenders"]
    for contender in (paged, fake):
        assert contender["failed"] is None
        assert [point["users"] for point in contender["points"]] == [1, 2]
        for point in contender["points"]:
            assert point["figures"] is not None
            assert point["figures"]["output_throughput"] > 0
            assert point["figures"]["failed"] == 0
        assert [run["steps_done"] for run in contender["agents"]] == [[1]]
    occupancy = paged["points"][1]["occupancy"]
    assert occupancy is not None
    assert occupancy["running_max"] == 2
    assert fake["points"][1]["occupancy"] is None
    assert fake["label"] == "fake (fake)"
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {
        "compare.json", "report.html", "compare.svg",
    }  # fmt: skip


def test_an_unreachable_peer_is_one_line_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(["bench", "compare", "--output", str(tmp_path / "out"), "--url", "p=http://127.0.0.1:9"])
        == 1
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "http://127.0.0.1:9" in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_peer_that_answers_500_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(FakeServer(reply=lambda body: Reply(status=500))) as url:
        code = cli.main(["bench", "compare", "--output", str(tmp_path / "out"), "--url", f"p={url}"])
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "HTTP 500" in lines[0]


def test_a_peer_that_begins_to_fail_keeps_what_it_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return Reply(status=500) if server.most_under_way > 4 else answer(body, [0.002] * body["max_tokens"])

    server = FakeServer(reply=reply)
    with served(server) as url:
        code, comparison = compared(
            tmp_path, "--modes", "none", "--url", f"p={url}", "--users", "2,8,16", "--seconds", "0.5"
        )
    assert code == 1
    (peer,) = comparison["contenders"]
    assert peer["failed"] is not None
    assert "HTTP 500" in peer["failed"]
    first, second, third = peer["points"]
    assert first["figures"] is not None
    assert first["failed"] is None
    assert second["failed"] == peer["failed"]
    assert third["skipped"] is not None
    assert any("p (fake) failed: " in line for line in capsys.readouterr().err.splitlines())
    assert "HTTP 500" in (tmp_path / "new" / "out" / "report.html").read_text()


def test_ctrl_c_leaves_a_report_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = compare.Http.point

    def point(self: compare.Http, users: int, *args: Any) -> Point:
        if users == 2:
            raise KeyboardInterrupt
        return measure(self, users, *args)

    monkeypatch.setattr(compare.Http, "point", point)
    with served(FakeServer()) as url:
        code, comparison = compared(
            tmp_path, "--modes", "none", "--url", f"p={url}", "--users", "1,2", "--seconds", "0.2"
        )
    assert code == 130
    assert not comparison["is_complete"]
    assert [point["users"] for point in comparison["contenders"][0]["points"]] == [1]
    assert "Broken off" in (tmp_path / "new" / "out" / "report.html").read_text()


def test_an_output_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert cli.main(["bench", "compare", "--output", str(tmp_path / "out")]) == 1
    assert "--output" in capsys.readouterr().err


def test_help_and_typos(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "compare", "--help"])
    assert "--kv-cache-memory" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["bench", "compare", "--user", "3"])
    assert "did you mean --users?" in capsys.readouterr().err
