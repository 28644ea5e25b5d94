"""``minivllm trace summary``: what it says of situations that are known, and of files that aren't traces."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import cli, trace
from minivllm.config import EngineConfig
from minivllm.engine.steps import Arrival, StepRecord
from minivllm.errors import TraceError
from minivllm.request import SamplingParams
from minivllm.tracing.lives import Life, Lives
from minivllm.tracing.reader import TraceReader
from minivllm.tracing.words import count, duration, life_lines
from minivllm.tracing.writer import TraceWriter
from tests.engine.test_scheduler import Job, Setup
from tests.tracing import Clock, Story, begin

PAGED = Setup("paged", "continuous", 50, max_model_len=200, budget=200)
"""Steps of 2.25 s, and 0.125 s between them."""


def job(length: int, max_tokens: int, token: int = 3) -> Job:
    return Job([token] * length, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def traced(path: Path, setup: Setup = PAGED, **options: bool | frozenset[int]) -> Story:
    clock = Clock()
    writer = TraceWriter(str(path))
    writer.begin(EngineConfig(), {"model": "fake", "device": "cpu"}, origin=clock(), runs_ahead=False)
    return begin(setup, writer, clock=clock, **options)  # type: ignore[arg-type]


@pytest.fixture
def summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints about the test's trace, which must be whole."""

    def summarise(*request: str) -> str:
        capsys.readouterr()
        assert cli.main(["trace", "summary", str(tmp_path / "t.json"), *request]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return summarise


def test_a_request_that_nothing_hinders(tmp_path: Path, summary: Callable[..., str]) -> None:
    story = traced(tmp_path / "t.json")
    story.clock.now += 0.5
    story.add("a", job(40, 3), client_id="mine")
    story.finish()
    told = (
        "request a, mine\n"
        "  arrived at 0.50 s with a prompt of 40 tokens, for at most 3 more\n"
        "  admitted at once\n"
        "  its prefill took 1 step, 2.2 s\n"
        "  first token after 2.2 s\n"
        "  3 tokens in 4.8 s, 2.4 s each; the slowest took 2.4 s, in step 2\n"
        "  ended at 7.50 s with 3 tokens: length (max_tokens, or the context, was reached)\n"
    )
    assert summary("a") == told
    assert summary("mine") == told


def test_waiting_for_blocks(tmp_path: Path, summary: Callable[..., str]) -> None:
    """The second comes while the first's second step runs, and finds no blocks until the first has ended."""
    story = traced(tmp_path / "t.json", replace(PAGED, num_blocks=7))
    story.add("a", job(64, 4))
    story.step()
    story.add("b", job(40, 1, token=4))
    story.finish()
    assert "queued 7.1 s because no blocks were free (1 request ran)\n" in summary("b")


def test_waiting_for_a_step_then_for_blocks(tmp_path: Path, summary: Callable[..., str]) -> None:
    story = traced(tmp_path / "t.json", replace(PAGED, num_blocks=7))
    story.add("a", job(64, 3))
    story.step()
    story.add("b", job(40, 1, token=4))
    story.clock.now += 2.0
    story.finish()
    told = summary("b")
    assert "queued 6.8 s, of it 4.8 s because no blocks were free and 2.0 s because the next step had" in told


def test_waiting_for_a_slot(tmp_path: Path, summary: Callable[..., str]) -> None:
    story = traced(tmp_path / "t.json", Setup("contiguous", "sequential", 64, max_model_len=200, budget=200))
    story.add("a", job(20, 2))
    story.add("b", job(20, 1))
    story.finish()
    assert "queued 4.8 s because as many requests ran as --num-parallel allows (1 request ran)\n" in summary(
        "b"
    )


def test_a_prompt_in_chunks_and_a_full_step(tmp_path: Path, summary: Callable[..., str]) -> None:
    story = traced(tmp_path / "t.json", replace(PAGED, budget=50))
    story.add("a", job(120, 3))
    story.add("b", job(60, 2, token=4))
    story.finish()
    assert "its prefill took 3 steps, 7.0 s\n" in summary("a")
    told = summary("b")
    assert (
        "queued 4.8 s because others took all of the steps' --max-num-batched-tokens (1 request ran)\n"
        in told
    )
    assert "its prefill took 2 steps, 4.6 s\n" in told
    # The last chunk of one prompt, and the first of another.
    assert "3 tokens in 4.8 s, 2.4 s each; the slowest took 2.4 s, in step 4 beside 30 tokens of" in summary(
        "a"
    )


def test_a_prefix_hit(tmp_path: Path, summary: Callable[..., str]) -> None:
    story = traced(tmp_path / "t.json")
    for name in ("a", "b"):
        story.add(name, job(40, 1))
        story.step()
    assert "prefix cache" not in summary("a")
    assert "  32 of its 40 prompt tokens were in the prefix cache\n" in summary("b")
    assert "in the prefix cache: 32 of 80 prompt tokens\n" in summary()


def test_an_eviction(tmp_path: Path, summary: Callable[..., str]) -> None:
    """Two sequences of 2 blocks in a pool of 5: when both want a third, the younger goes."""
    story = traced(tmp_path / "t.json", replace(PAGED, num_blocks=5, prefix_cache=False, max_model_len=80))
    story.add("old", job(30, 30))
    story.add("young", job(30, 20, token=4))
    story.finish()
    assert "evicted" not in summary("old")
    (eviction,) = [(record, item) for record in story.records for item in record.evicted]
    again = next(r for r in story.records[eviction[0].number :] if r.admitted)
    seconds = again.schedule_time - eviction[0].schedule_time
    assert seconds > 20
    # What it had computed, and the token that was to be computed when there was no block for it.
    assert (
        f"evicted once, at step {eviction[0].number}: waited {seconds:.0f} s because no blocks were free, "
        f"and recomputed {eviction[1].num_computed_tokens} tokens\n"
    ) in summary("young")
    assert story.recomputed()["young"] == eviction[1].num_computed_tokens
    assert f"evictions: 1, of 1 request; {eviction[1].num_computed_tokens} tokens recomputed\n" in summary()


def test_an_abort_an_error_and_what_is_unfinished(tmp_path: Path, summary: Callable[..., str]) -> None:
    story = traced(tmp_path / "t.json", replace(PAGED, max_num_seqs=1), failing_steps=frozenset({3}))
    story.add("left", job(20, 9))
    story.add("failed", job(20, 9))
    story.add("late", job(20, 9))
    story.add("last", job(20, 9))
    story.step()
    story.step()
    story.abort("left")
    story.step()
    story.step()
    assert "ended at 4.75 s with 2 tokens: abort (its client left, or it came to a stop string)\n" in summary(
        "left"
    )
    told = summary("failed")
    assert "its prefill was not over after 1 step\n" in told
    assert "ended at 7.00 s with 0 tokens: error: StepFailed: step 3\n" in told
    assert "still ran when the trace ended, at 9.38 s, with 1 token\n" in summary("late")
    told = summary("last")
    assert "queued 9.4 s because as many requests ran as --max-num-seqs allows, and not admitted\n" in told
    assert "still waited when the trace ended, at 9.38 s, with 0 tokens\n" in told
    overview = summary()
    assert "4 requests: 2 unfinished, 1 abort, 1 error\n" in overview
    assert "1 step failed\n" in overview
    story.abort("last")
    story.step()
    told = summary("last")
    assert "and not admitted\n" in told
    assert "ended at 9.50 s with 0 tokens: abort" in told


def test_a_grammar_and_a_limit_of_somebody_s_own() -> None:
    lives = Lives()
    record = StepRecord(1, 3.0, 3.0, 4.0, 4.0, 4.0, 4.0, 3.0, num_waiting=1, waits_for="moonlight")
    record.arrived.append(Arrival("a", 1.0, 2.5, 10, 5, 0))
    lives.follow(record)
    lives.finish(6.0)
    told = life_lines(lives.all[0], 6.0)
    assert "  its grammar was compiled in 1.5 s" in told
    assert (
        "  queued 3.5 s, of it 3.0 s because of moonlight and 500 ms because the next step had yet to begin, "
        "and not admitted"
    ) in told


def test_the_overview(tmp_path: Path, summary: Callable[..., str]) -> None:
    story = traced(tmp_path / "t.json", replace(PAGED, max_num_seqs=2, prefix_cache=False))
    for number in range(12):
        story.add(f"r{number}", job(10 + number, 1 + number % 3))
    story.finish()
    lines = summary().splitlines()
    num_steps = len(story.records)
    seconds = num_steps * 2.375 - 0.125
    assert lines[0].startswith("minivllm 0.1.0, fake on cpu, ")
    assert lines[1] == (
        f"{seconds:.0f} s from the first request on: {num_steps} steps, {sum(range(10, 22))} prefill tokens, "
        "24 tokens generated"
    )
    assert lines[2] == "12 requests: 12 length"
    phases = {
        line.split()[0]: line.split()[1:4] for line in lines if line.split()[1:] and "." in line.split()[1]
    }
    assert phases["execute"] == ["2250.00", "2250.00", "2250.00"]
    assert phases["schedule"] == phases["update"] == ["0.00", "0.00", "0.00"]
    assert "  100% of all waiting because as many requests ran as --max-num-seqs allows" in lines
    table = lines[
        next(number for number, line in enumerate(lines) if line.startswith("slowest requests")) + 1 :
    ]
    ended = {name: last.metrics.finished_time - 1.0 for name, last in story.endings.items() if last.metrics}
    slowest = sorted(ended, key=lambda name: -ended[name])[:10]
    assert {line.split()[0] for line in table} == set(slowest)
    assert [line.split()[1] for line in table] == [f"{ended[name]:.2f}" for name in slowest]


# Files and ids that don't do


@pytest.fixture(scope="module")
def small_trace(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("trace") / "t.json"
    story = traced(path, replace(PAGED, num_blocks=5, max_model_len=80), failing_steps=frozenset({4}))
    for name in ("chatcmpl-1f-0", "chatcmpl-1f-1", 'cmpl-"\\é-0'):
        story.add(name, job(30, 2), client_id="mine")
    story.finish()
    return path.read_bytes()


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(["trace", "summary", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("minivllm trace: error: ")
    assert len(error.splitlines()) == 1
    return error


def test_cut_short_at_every_byte(
    small_trace: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    line_ends = {offset + 1 for offset, byte in enumerate(small_trace) if byte == ord("\n")}
    header_end = sorted(line_ends)[1]
    starts = [offset for offset in line_ends if small_trace[offset:].startswith(b'{"cat":"step"')]
    for size in range(len(small_trace) + 1):
        path.write_bytes(small_trace[:size])
        num_whole = sum(small_trace.index(b"\n", start) < size for start in starts)
        num_read, is_whole, message = 0, False, ""
        try:
            for _ in TraceReader(str(path)):
                num_read += 1
            is_whole = True
        except TraceError as error:
            message = str(error)
        assert num_read == num_whole
        assert is_whole == (size in line_ends and size >= header_end)
        if not is_whole and size > 0:
            where = f"after step {num_whole}" if num_whole else "before its first step"
            assert message == f"{path} is cut short {where}"
    for num_steps, start in enumerate(sorted(starts)):
        path.write_bytes(small_trace[: start + 99])
        if num_steps == 0:
            assert error_of(capsys, str(path)).endswith("t.json is cut short before its first step\n")
            continue
        assert cli.main(["trace", "summary", str(path)]) == 1
        told = capsys.readouterr()
        assert f": {count(num_steps, 'step')}, " in told.out
        assert told.err.endswith(
            f"is cut short after step {num_steps}; what is said above is of the steps until then\n"
        )


@settings(max_examples=400)
@given(data=st.data())
def test_a_damaged_file_is_never_a_traceback(
    small_trace: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes are changed, left out and put in; half of the time where the steps are."""
    damaged = bytearray(small_trace)
    for _ in range(data.draw(st.integers(1, 4))):
        offset = data.draw(st.integers(0, len(damaged)))
        if data.draw(st.booleans()):
            offset = max(damaged.rfind(b'{"cat":"step"', 0, offset), 0) + data.draw(st.integers(0, 400))
        junk = data.draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from(
                    [b"1e999", b"-1", b"null", b"[]", b"{}", b"9" * 5000, b"[" * 100_000, b"NaN"]
                ),
            )
        )
        damaged[offset : offset + data.draw(st.integers(0, 6))] = junk
    path = tmp_path_factory.mktemp("damaged") / "t.json"
    path.write_bytes(damaged)
    for request in ((), ("chatcmpl-1f-0",)):
        with contextlib.suppress(TraceError), contextlib.redirect_stdout(None):
            trace.main(["summary", str(path), *request])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not JSON at all", "is not a minivllm trace"),
        (b"\xff\xfe\x00", "is not a minivllm trace"),
        (b'{"traceEvents": []}', "is not a minivllm trace"),
        (b'[\n{"name":"process_name","ph":"M"},\n', "is not a minivllm trace"),
        (b'[\n{"name":"minivllm trace","ph":"M"},\n', "is damaged: line 2 "),
        (b'[\n{"name":"minivllm trace","ph":"M","args":{"format":9}},\n', "has format 9, "),
        (
            b'[\n{"name":"minivllm trace","ph":"M","args":{"format":1}},\n{"cat":"step",}\n',
            "is damaged: line 3, ",
        ),
    ],
)
def test_files_that_are_no_traces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    assert f"{path} {message}" in error_of(capsys, str(path))


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, "/nowhere.json").endswith("can't read /nowhere.json: No such file or directory\n")
    assert error_of(capsys, str(tmp_path)).endswith("Is a directory\n")


def test_a_trace_without_steps(small_trace: bytes, tmp_path: Path, summary: Callable[..., str]) -> None:
    """A server that has been asked nothing yet."""
    (tmp_path / "t.json").write_bytes(b"".join(small_trace.splitlines(keepends=True)[:4]))
    assert summary().endswith("0 requests: none\n")


def test_which_request_is_meant(
    small_trace: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(small_trace)
    for given_id in ('cmpl-"', "é", 'cmpl-"\\é-0'):
        assert cli.main(["trace", "summary", str(path), given_id]) == 0
        assert capsys.readouterr().out.startswith('request cmpl-"\\é-0, mine\n')
    error = error_of(capsys, str(path), "chatcmpl-1f")
    assert error.endswith("'chatcmpl-1f' could be chatcmpl-1f-0, chatcmpl-1f-1\n")
    error = error_of(capsys, str(path), "mine")
    assert "could be chatcmpl-1f-0, chatcmpl-1f-1, cmpl-" in error
    error = error_of(capsys, str(path), "chatcmpl-1f-7")
    assert "no request 'chatcmpl-1f-7' among the 3 of this trace; near ones: chatcmpl-1f-" in error
    path.write_bytes(small_trace[:-5])
    error = error_of(capsys, str(path), "zzz")
    assert "no request 'zzz' among the 3 of this trace; " in error
    assert "is cut short after step " in error


def test_many_that_could_be_meant() -> None:
    lives = [Life(Arrival(f"r{number}", 0.0, 0.0, 1, 1, 0), []) for number in range(7)]
    with pytest.raises(TraceError, match="'r' could be r0, r1, r2, r3, r4 and 2 more"):
        trace.find(lives, "r")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (0.00123, "1.2 ms"),
        (0.0351, "35 ms"),
        (0.996, "1.0 s"),
        (1.24, "1.2 s"),
        (75.4, "75 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts() -> None:
    assert (count(1, "token"), count(0, "token"), count(12345, "token")) == (
        "1 token",
        "0 tokens",
        "12,345 tokens",
    )


def test_reading_a_trace_needs_no_torch(small_trace: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(small_trace)
    code = (
        "import sys; from minivllm import cli\n"
        f"assert cli.main(['trace', 'summary', {str(path)!r}]) == 0\n"
        "print([name for name in ('torch', 'numpy', 'msgspec') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.endswith("[]\n"), result.stderr
