"""``minivllm bench serve`` as a whole: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minivllm import cli
from minivllm_bench.generator import FAILURES_IN_A_ROW
from minivllm_bench.load import arrival_times
from minivllm_bench.metrics import Goals, summarise
from minivllm_bench.records import RequestRecord

from .fake_server import FakeServer, Reply, answer, served, text_event

SHORT = ("--workload", "short-short")


def bench(url: str, *flags: str) -> int:
    return cli.main(["bench", "serve", "--url", url, *flags])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_a_closed_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server, path = FakeServer(crowd=3), tmp_path / "out.json"
    with served(server) as url:
        flags = [*SHORT, "--users", "3", "--num-requests", "10", "--goal-ttft", "5000", "--output", str(path)]
        assert bench(url, *flags) == 0
    bodies = server.bodies[1:]  # the first is the probe
    assert len(bodies) == 10
    assert server.most_under_way == 3
    assert {len(body["prompt"].split()) for body in bodies} == {32}
    assert {body["max_tokens"] for body in bodies} == {32}
    assert len({body["prompt"].split()[0] for body in bodies}) == 10

    result = read(path)
    assert (result["url"], result["model"], result["failure"]) == (f"{url}/v1", "fake", None)
    assert result["load"]["users"] == 3
    assert result["machine"]["cores"] == os.cpu_count()
    assert 0 < result["generator_cpu_share"] <= 1.5
    assert len(result["requests"]) == 10
    records = [RequestRecord(**fields) for fields in result["requests"]]
    summary = summarise(records, result["summary"]["seconds"], Goals(ttft=5))
    for name, value in result["summary"].items():
        assert summary[name] == pytest.approx(value, abs=1e-4), name  # times in the file are rounded
    printed = capsys.readouterr()
    assert "10 completed, 0 failed, 0 unfinished" in printed.out
    assert "320 of prompts, 0 of them from the server's cache, 320 of answers" in printed.out
    assert "within ttft 5000 ms" in printed.out
    assert f"{result['summary']['e2e']['p99'] * 1000:.1f}" in printed.out
    assert printed.err == ""


def test_an_open_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server, path = FakeServer(), tmp_path / "out.json"
    with served(server) as url:
        flags = [*SHORT, "--rate", "200", "--burstiness", "0.5", "--num-requests", "30", "--seed", "4"]
        assert bench(url, *flags, "--output", str(path)) == 0
    arrivals = arrival_times(200, 0.5, random.Random("4/arrivals"))
    sent = [request["sent"] for request in read(path)["requests"]]
    assert sent == pytest.approx(list(itertools.islice(arrivals, 30)), abs=1e-5)
    assert "200 sessions/s, burstiness 0.5, seed 4" in capsys.readouterr().out


def test_chats_send_what_was_said_before() -> None:
    server = FakeServer()
    with served(server) as url:
        flags = ["--workload", "chat", "--endpoint", "chat", "--users", "2", "--num-requests", "30"]
        assert bench(url, *flags) == 0
    bodies = server.bodies[1:]
    assert len(bodies) == 30
    later = [body["messages"] for body in bodies if len(body["messages"]) > 1]
    assert len(later) > 10
    for messages in later:
        assert messages[1]["role"] == "assistant"
        assert messages[1]["content"].startswith(" a0 b1")
        assert messages[:-2] in [body["messages"] for body in bodies]


def test_a_file_is_sent_once_word_for_word(tmp_path: Path) -> None:
    workload = tmp_path / "mine.jsonl"
    workload.write_text('{"prompt": "Wörd  for\\nword", "max_tokens": 3}\n{"prompt": "b", "max_tokens": 2}\n')
    server = FakeServer()
    with served(server) as url:
        assert bench(url, "--workload", str(workload), "--users", "1") == 0
    assert [(body["prompt"], body["max_tokens"]) for body in server.bodies[1:]] == [
        ("Wörd  for\nword", 3),
        ("b", 2),
    ]


def test_nothing_secret_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    few = [*SHORT, "--num-requests", "1", "--output", str(path)]
    server = FakeServer()
    with served(server) as url:
        with_password = url.replace("http://", "http://me:hunter2@")
        assert bench(with_password, *few) == 0
        assert server.headers[-1]["Authorization"].startswith("Basic ")
        text = path.read_text() + "".join(capsys.readouterr())
        assert bench(with_password, "--api-key", "sk-1", *few) == 1
        text += "".join(capsys.readouterr())
        assert bench(url, "--api-key", "sk-1", *few) == 0
        assert server.headers[-1]["Authorization"] == "Bearer sk-1"
        text += path.read_text() + "".join(capsys.readouterr())
        assert bench(url, "--api-key=sk-2", *few) == 0
        text += path.read_text() + "".join(capsys.readouterr())
        monkeypatch.setenv("OPENAI_API_KEY", "sk-3")
        assert bench(url, *few) == 0
        assert server.headers[-1]["Authorization"] == "Bearer sk-3"
        text += path.read_text() + "".join(capsys.readouterr())
    for secret in ("hunter2", "sk-1", "sk-2", "sk-3"):
        assert secret not in text


def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with served(FakeServer()) as url:
        assert bench(url, *SHORT, "--num-requests", "1") == 0


def test_an_unreachable_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and doesn't listen
        port = taken.getsockname()[1]
        for flags in ((), ("--model", "m")):
            assert bench(f"http://127.0.0.1:{port}", *flags, "--output", str(tmp_path / "x")) == 1
            line = error_line(capsys)
            assert f"http://127.0.0.1:{port}/v1/" in line
            assert "can't connect: Connection refused" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply([(0, b'{"error": {"message": "wrong key"}}')], 401), "HTTP 401: wrong key"),
        (Reply([(0, b'{"error": {"message": "no model m"}}')], 404), "HTTP 404: no model m"),
        (Reply([(0, b"Internal Server Error")], 500), "HTTP 500: Internal Server Error"),
        (Reply([(0, b'{"error": {"message": "Unknown field: ignore_eos"}}')], 400), 'leaves out a field'),
        (Reply([(0, text_event("a"))]), "the stream ended before"),
        (Reply(hangs=True), "no complete answer within 0.5 s"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_answer_the_probe(
    reply: Reply, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(FakeServer(lambda body: reply)) as url:
        assert bench(url, "--timeout", "0.5" if reply.hangs else "60") == 1
        line = error_line(capsys)
        assert line.startswith(f"minivllm bench: error: {url}/v1/completions: ")
        assert message in line


def failing_after(count: int, reply: Reply) -> FakeServer:
    """Answers the probe and ``count`` requests."""
    server = FakeServer()
    server.reply = lambda body: answer(body) if len(server.bodies) <= count + 1 else reply
    return server


SERVER_ERROR = Reply([(0, b'{"error": {"message": "CUDA error"}}')], 500)


def test_some_failures_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    with served(failing_after(4, SERVER_ERROR)) as url:
        assert bench(url, *SHORT, "--num-requests", "10", "--output", str(path)) == 0
    summary = read(path)["summary"]
    assert (summary["completed"], summary["failed"]) == (4, 6)
    assert summary["errors"] == {"HTTP 500: CUDA error": 6}
    assert "6 x HTTP 500: CUDA error" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "num_requests"), [(0, 10), (0, 1000), (5, 1000)])
def test_too_many_failures_end_the_run(
    count: int, num_requests: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What there is by then is written."""
    path = tmp_path / "out.json"
    with served(failing_after(count, SERVER_ERROR)) as url:
        flags = [*SHORT, "--users", "1", "--num-requests", str(num_requests), "--output", str(path)]
        assert bench(url, *flags) == 1
    line = error_line(capsys)
    result = read(path)
    assert result["failure"] in line
    summary = result["summary"]
    assert (summary["completed"], summary["requests"]) == (count, len(result["requests"]))
    assert summary["failed"] == min(num_requests, FAILURES_IN_A_ROW)
    assert "CUDA error" in line or "10 requests were sent, and all failed" in line


def test_a_server_that_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    with served(FakeServer(dies_after=6)) as url:
        assert bench(url, *SHORT, "--users", "1", "--num-requests", "1000", "--output", str(path)) == 1
    assert f"{url}/v1/completions: can't connect: Connection refused" in error_line(capsys)
    summary = read(path)["summary"]
    assert (summary["completed"], summary["failed"]) == (5, 2)  # one was cut, one got no connection


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    server, path = failing_after(3, Reply([(0, text_event("a"))], hangs=True)), tmp_path / "out.json"
    with served(server) as url:
        argv = ["bench", "serve", "--url", url, *SHORT, "--users", "1", "--output", str(path)]
        process = subprocess.Popen(
            [sys.executable, "-m", "minivllm.cli", *argv],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in a shell's background ignore it, and a child inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            assert server.hangs.wait(60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert "3 completed, 0 failed, 1 unfinished" in out
    assert err == "minivllm bench serve: error: interrupted\n"
    assert [len(request["chunk_times"]) for request in read(path)["requests"]][:3] == [32] * 3
    assert read(path)["failure"] == "interrupted"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workload", "fixd"], "--workload must be one of fixed"),
        (["--users", "0"], "--users must be at least 1, got 0"),
        (["--users", "2", "--rate", "3"], "either --users"),
        (["--goal-ttft", "-1"], "--goal-ttft must be above 0, got -1"),
        (["--timeout", "0"], "--timeout must be above 0, got 0"),
        (["--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["--extra-body", "{"], "--extra-body is not JSON"),
        (["--extra-body", "[]"], "--extra-body must be a JSON object, got []"),
        (["--output", "/nowhere/x.json"], "--output /nowhere/x.json can't be written"),
        (["--url", "localhost:8000"], "http://127.0.0.1:8000, got 'localhost:8000'"),
        (["--user", "3"], "did you mean --users?"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: int | str | None = cli.main(["bench", "serve", *flags])
    except SystemExit as error:
        code = error.code
    assert code in (1, 2)
    assert message in error_line(capsys)


def test_without_aiohttp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "minivllm_bench.client")
    assert cli.main(["bench", "serve"]) == 1
    assert error_line(capsys) == "minivllm bench: error: aiohttp is missing: pip install 'minivllm[bench]'"
