"""Step records against an account that is kept outside of the engine, and the file they are written to."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from minivllm.config import EngineConfig
from minivllm.engine.client import EngineClient
from minivllm.engine.scheduler import SampledToken
from minivllm.engine.startup import build_engine
from minivllm.engine.steps import StepRecord
from minivllm.errors import StartupError
from minivllm.request import FinishReason, SamplingParams, Terms
from minivllm.tracing.lives import Lives
from minivllm.tracing.reader import TraceReader
from minivllm.tracing.writer import TraceWriter
from minivllm.weights.files import resolve_model
from tests.engine.test_scheduler import Job, Setup, make_job, setups
from tests.tiny_model import write_tiny_model
from tests.tracing import COMPUTE, LAUNCH, Clock, Story, begin, play

MOMENTS = ("schedule_time", "execute_time", "launched_time", "wait_time", "tokens_time", "end_time")
LOADS = {
    "setup": setups(),
    "num_jobs": st.one_of(st.integers(1, 8), st.integers(8, 20)),
    "seed": st.integers(0, 2**32),
    "failing_steps": st.one_of(st.just(frozenset()), st.frozensets(st.integers(1, 60), max_size=3)),
    "runs_ahead": st.booleans(),
}


def random_story(
    setup: Setup, num_jobs: int, seed: int, failing_steps: frozenset[int], runs_ahead: bool, *sinks: Any
) -> Story:
    clock = sinks[0].clock if sinks and hasattr(sinks[0], "clock") else None
    story = begin(setup, *sinks, failing_steps=failing_steps, runs_ahead=runs_ahead, clock=clock)
    return play(story, [make_job(seed, number, setup.max_model_len) for number in range(num_jobs)])


def tokens_in(record: StepRecord) -> list[str]:
    """Who got a token from the step."""
    if record.error is not None:
        return []
    sampled = [*record.decodes, *(item.request_id for item in record.prefills if item.is_last)]
    failed = {item.request_id for item in record.ended if item.error is not None}
    return [name for name in sampled if name not in record.dropped and name not in failed]


@settings(max_examples=200)
@given(**LOADS)
def test_the_records_tell_what_happened(
    setup: Setup, num_jobs: int, seed: int, failing_steps: frozenset[int], runs_ahead: bool
) -> None:
    story = random_story(setup, num_jobs, seed, failing_steps, runs_ahead)
    records, engine = story.records, story.engine
    assert [record.number for record in records] == list(range(1, len(records) + 1))

    # Who ran, and how many tokens each: as the runner was asked.
    ran = [
        {
            **{(name, context, 1): True for name, context in record.decodes.items()},
            **{(item.request_id, item.start, item.num_tokens): True for item in record.prefills},
        }
        for record in records
        if record.num_seqs
    ]
    assert [sorted(step) for step in ran] == [sorted(step) for step in story.runner.steps]
    assert [record.num_tokens for record in records if record.num_seqs] == [
        sum(num_tokens for _, _, num_tokens in step) for step in story.runner.steps
    ]
    # Who got a token: as the clients did.
    assert Counter(name for record in records for name in tokens_in(record)) == +story.num_tokens
    # Who came, and who left, when and why.
    arrived = [item.request_id for record in records for item in record.arrived]
    assert sorted(arrived) == sorted(map(str, range(num_jobs)))
    ended = {item.request_id: item for record in records for item in record.ended}
    assert len(ended) == sum(len(record.ended) for record in records) == num_jobs
    for name, last in story.endings.items():
        assert last.metrics is not None
        assert last.finish_reason is not None
        assert ended[name] == (name, last.metrics.finished_time, last.finish_reason, last.error)
    # Evictions, prefix hits and the limits of what runs.
    stats = engine.stats()
    assert sum(len(record.evicted) for record in records) == stats.num_preemptions
    assert (
        sum(item.num_cached_tokens for record in records for item in record.admitted)
        == stats.prefix_cache_hits
    )
    for record in records:
        assert record.num_running <= setup.most_running
        assert record.num_used_blocks <= setup.num_blocks
        assert (record.waits_for is not None) == (record.num_waiting > 0)
    event(f"evicted: {stats.num_preemptions > 0}")
    event(f"dropped: {any(record.dropped for record in records)}")


@settings(max_examples=100)
@given(**LOADS)
def test_the_times_are_the_clock_s(
    setup: Setup, num_jobs: int, seed: int, failing_steps: frozenset[int], runs_ahead: bool
) -> None:
    """Steps launch in 1/4 s and compute in 2 s, one after the other on the device: all exact in binary."""
    records = random_story(setup, num_jobs, seed, failing_steps, runs_ahead).records
    steps = [record for record in records if record.num_seqs]
    for record in records:
        times = [getattr(record, moment) for moment in MOMENTS]
        assert times == sorted(times)
        assert record.schedule_seconds == record.update_seconds == 0.0
    for record in steps:
        whole = record.end_time - record.schedule_time
        phases = record.execute_seconds + record.wait_seconds
        if not runs_ahead:
            assert phases == whole == LAUNCH + COMPUTE
        elif record.error is None:
            assert record.execute_seconds == LAUNCH
            assert record.device_seconds == COMPUTE
            assert phases <= whole
    for before, after in pairwise(steps):
        assert before.tokens_time <= after.device_start or after.error is not None
        assert before.execute_time <= after.schedule_time  # one thread


@settings(max_examples=200)
@given(**LOADS)
def test_every_life_is_covered_by_its_stays(
    setup: Setup, num_jobs: int, seed: int, failing_steps: frozenset[int], runs_ahead: bool
) -> None:
    story = random_story(setup, num_jobs, seed, failing_steps, runs_ahead)
    lives = Lives()
    for record in story.records:
        lives.follow(record)
    assert len(lives.all) == num_jobs
    recomputed = story.recomputed()
    for life in lives.all:
        metrics = story.endings[life.request_id].metrics
        assert metrics is not None
        assert life.ending is not None
        assert life.num_output_tokens == story.num_tokens[life.request_id]
        assert (life.first_token_time or 0.0) == metrics.first_token_time
        # From its arrival to its end it waits or runs: each second is in one place.
        now = life.arrival.time
        for stay in life.stays:
            assert stay.queued_time == now
            until = life.ending.time if stay.admitted_time is None else stay.admitted_time
            assert sum(stay.waits.values()) == pytest.approx(until - now, abs=1e-9)
            assert min(stay.waits.values(), default=0.0) >= 0.0
            now = life.ending.time if stay.evicted_time is None else stay.evicted_time
            assert until <= now
        assert now == life.ending.time
        if metrics.first_scheduled_time:
            assert life.stays[0].admitted_time == metrics.first_scheduled_time
            assert life.stays[0].num_cached_tokens == metrics.num_cached_tokens
        counts = (len(life.evictions), life.num_recomputed_tokens)
        told = (metrics.num_preemptions, recomputed[life.request_id])
        if runs_ahead:  # the next step may have evicted or computed it before its end came to light
            assert all(have <= want for have, want in zip(counts, told, strict=True))
        else:
            assert counts == told


def test_an_abort_without_work_is_told_at_once() -> None:
    """No step may ever follow."""
    story = begin(Setup("paged", "continuous", 8, max_model_len=64, budget=64))
    story.add("a", Job([3] * 5, SamplingParams(max_tokens=9)))
    story.abort("a")
    assert not story.engine.has_work
    (record,) = story.records
    assert [item.request_id for item in record.arrived] == ["a"]
    assert [(item.request_id, item.reason) for item in record.ended] == [("a", FinishReason.ABORT)]


def test_who_fails_while_sampled_is_not_dropped() -> None:
    """Its end is that step's."""
    story = begin(Setup("paged", "continuous", 8, max_model_len=64, budget=64))
    story.runner.execute = lambda batch: lambda: [SampledToken(3, error="no")]  # type: ignore[method-assign]
    story.add("a", Job([3] * 5, SamplingParams(max_tokens=9)))
    story.finish()
    (record,) = story.records
    assert [(item.request_id, item.error) for item in record.ended] == [("a", "no")]
    assert record.dropped == []


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (Setup("paged", "continuous", 5, max_model_len=64, budget=64), "blocks"),
        (Setup("contiguous", "continuous", 7, max_model_len=64, budget=64), "blocks"),
        (Setup("paged", "continuous", 50, max_model_len=64, budget=64, max_num_seqs=1), "max_num_seqs"),
        (Setup("paged", "sequential", 50, max_model_len=64, budget=64), "num_parallel"),
        (Setup("paged", "continuous", 50, max_model_len=64, budget=40), "max_num_batched_tokens"),
    ],
)
def test_why_the_first_in_the_queue_waits(setup: Setup, reason: str) -> None:
    story = begin(setup)
    for name in ("a", "b"):
        story.add(name, Job([3 + ord(name) % 5] * 40, SamplingParams(max_tokens=4, ignore_eos=True)))
    story.step()
    assert (story.records[0].waits_for, story.records[0].num_waiting) == (reason, 1)
    story.finish()
    assert story.records[-1].waits_for is None


# The file


class ClockedWriter(TraceWriter):
    """A writer that has begun, and the clock that its engine must have."""

    def __init__(self, path: Path, *, runs_ahead: bool) -> None:
        super().__init__(str(path))
        self.clock = Clock()
        self.begin(EngineConfig(seed=3), {"model": "fake"}, origin=self.clock(), runs_ahead=runs_ahead)


def events_in(path: Path) -> list[dict[str, Any]]:
    """As a strict reader has it, who needs the array closed."""
    text = path.read_text()
    assert text.endswith(",\n")
    events: list[dict[str, Any]] = json.loads(text[:-2] + "]")
    assert [json.dumps(event) for event in events] == [
        json.dumps(json.loads(line.rstrip(","))) for line in text.splitlines()[1:]
    ]
    return events


def check_chrome_events(events: list[dict[str, Any]]) -> None:
    """The rules of the Trace Event Format that viewers depend on, for the kinds of events that are used."""
    rows: dict[int, list[tuple[int, int]]] = defaultdict(list)
    stacks: dict[int, list[int]] = defaultdict(list)
    last: dict[int, int] = defaultdict(int)
    waiting: dict[tuple[str, str], tuple[str, int]] = {}
    for item in events:
        assert item["pid"] == 1
        if item["ph"] == "M":
            continue
        assert isinstance(item["ts"], int)
        assert item["ts"] >= 0
        if item["ph"] == "X":
            assert item["dur"] >= 0
            rows[item["tid"]].append((item["ts"], item["ts"] + item["dur"]))
        elif item["ph"] in "BE":
            assert item["ts"] >= last[item["tid"]]
            last[item["tid"]] = item["ts"]
            if item["ph"] == "B":
                assert item["name"]
                stacks[item["tid"]].append(item["ts"])
            else:
                stacks[item["tid"]].pop()
        elif item["ph"] == "b":
            assert (item["cat"], item["id"]) not in waiting
            waiting[item["cat"], item["id"]] = item["name"], item["ts"]
        elif item["ph"] == "e":
            name, start = waiting.pop((item["cat"], item["id"]))
            assert item["name"] == name
            assert item["ts"] >= start
        else:
            assert item["ph"] == "C"
            assert all(isinstance(value, int) for value in item["args"].values())
    assert not waiting
    assert not any(stacks.values())
    assert not set(rows) & set(stacks)
    for spans in rows.values():
        # Each lies within the one that encloses it, which comes before it, or after it altogether.
        open_ends: list[int] = []
        for start, end in spans:
            while open_ends and start >= open_ends[-1] and end > open_ends[-1]:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1]
            open_ends.append(end)


def admissions(records: list[StepRecord]) -> list[tuple[str, int]]:
    """Who began to run, and when, in microseconds of the trace."""
    ended: set[str] = set()
    begun = []
    for record in records:
        now = round((record.schedule_time - 1.0) * 1e6)
        begun += [(item.request_id, now) for item in record.admitted if item.request_id not in ended]
        ended |= {item.request_id for item in record.ended}
    return begun


@settings(max_examples=100)
@given(**LOADS)
def test_what_is_written_is_valid_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    setup: Setup,
    num_jobs: int,
    seed: int,
    failing_steps: frozenset[int],
    runs_ahead: bool,
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    writer = ClockedWriter(path, runs_ahead=runs_ahead)
    story = random_story(setup, num_jobs, seed, failing_steps, runs_ahead, writer)
    writer.close()
    events = events_in(path)
    check_chrome_events(events)
    begun = Counter((item["name"], item["ts"]) for item in events if item["ph"] == "B" and "args" in item)
    assert begun == Counter(admissions(story.records))
    reader = TraceReader(str(path))
    assert (reader.header["model"], reader.header["flags"]) == ("fake", {"seed": 3})
    back = list(reader)
    assert reader.num_steps == len(story.records) == len(back)
    for have, want in zip(back, story.records, strict=True):
        for moment in (*MOMENTS, "device_start"):
            assert getattr(have, moment) == pytest.approx(getattr(want, moment) - 1.0, abs=2e-6)
            setattr(have, moment, 0.0)
            setattr(want, moment, 0.0)
        for record, origin in ((have, 0.0), (want, 1.0)):
            record.ended = [item._replace(time=round(item.time - origin, 5)) for item in record.ended]
            record.arrived = [
                item._replace(
                    time=round(item.time - origin, 5), queued_time=round(item.queued_time - origin, 5)
                )
                for item in record.arrived
            ]
        assert have == want


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_the_trace_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = ClockedWriter(tmp_path / "trace.json", runs_ahead=False)
    setup = Setup("paged", "continuous", 20, max_model_len=64, budget=64)
    story = begin(setup, writer, clock=writer.clock)
    story.add("a", Job([3] * 5, SamplingParams(max_tokens=9, ignore_eos=True)))
    story.step()
    assert writer._file is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file.fileno())
    os.close(full)
    with caplog.at_level(logging.WARNING, logger="minivllm"):
        story.finish()
    assert story.num_tokens["a"] == 9
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"tracing ends with step 2: can't write {tmp_path}/trace.json: No space left on device"
    assert [record.number for record in TraceReader(str(tmp_path / "trace.json"))] == [1]


def test_what_the_file_held_is_kept(tmp_path: Path) -> None:
    """An engine that takes a dead one's place leaves its trace alone; one that couldn't start has none."""
    path, old = tmp_path / "trace.json", tmp_path / "trace.json.old"
    TraceWriter(str(path))
    TraceWriter(str(path))
    assert not old.exists()
    path.write_bytes(b"the first")
    TraceWriter(str(path))
    assert (path.read_bytes(), old.read_bytes()) == (b"", b"the first")
    TraceWriter(str(path))
    assert old.read_bytes() == b"the first"
    path.write_bytes(b"the second")
    TraceWriter(str(path))
    assert old.read_bytes() == b"the second"


@pytest.mark.parametrize("path", ["/nowhere/trace.json", "/dev/full", "."])
def test_a_path_that_cannot_be_written(tmp_path: Path, path: str) -> None:
    model = write_tiny_model(tmp_path)
    config = EngineConfig(model=model, load_format="dummy", device="cpu", kv_cache_memory=2**22, trace=path)
    with pytest.raises(StartupError, match=f"can't write --trace {path}: "):
        build_engine(config, resolve_model(model, load_format="dummy"))


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_model_s_steps(tmp_path: Path, runs_ahead: bool) -> None:
    """The real runner and clock: its requests' metrics and the trace agree."""
    model, path = write_tiny_model(tmp_path), tmp_path / "trace.json"
    config = EngineConfig(
        model=model, load_format="dummy", device="cpu", kv_cache_memory=2**22, trace=str(path)
    )
    engine = build_engine(config, resolve_model(model, load_format="dummy"))
    engine.runner.runs_ahead = runs_ahead
    for number in range(5):
        engine.add(f"request {number}", [7] * (20 + number), SamplingParams(max_tokens=6, ignore_eos=True))
    ended = []
    while engine.has_work:
        ended += [item for item in engine.step() if item.metrics is not None]
    reader, lives = TraceReader(str(path)), Lives()
    for record in reader:
        lives.follow(record)
    check_chrome_events(events_in(path))
    assert {life.request_id for life in lives.all} == {f"request {number}" for number in range(5)}
    origin = None
    for life in lives.all:
        metrics = next(item.metrics for item in ended if item.request_id == life.request_id)
        assert metrics is not None
        assert life.ending is not None
        origin = origin or metrics.arrival_time - life.arrival.time
        assert life.ending.time == pytest.approx(metrics.finished_time - origin, abs=1e-5)
        assert life.num_output_tokens == 6
        assert life.stays[0].num_cached_tokens == metrics.num_cached_tokens


def test_a_killed_engine_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    config = EngineConfig(
        model=write_tiny_model(tmp_path),
        load_format="dummy",
        device="cpu",
        kv_cache_memory=2**22,
        trace=str(path),
    )

    async def run() -> None:
        client = await EngineClient.spawn()
        try:
            await client.start(config, stall_timeout=60.0)
            long = SamplingParams(max_tokens=2000, ignore_eos=True)
            async for item in client.generate("a-0", [5] * 20, long, Terms(client_id="the client's")):
                assert item.new_token_ids
                os.kill(client._process.pid, signal.SIGKILL)
                break
        finally:
            await client.close()

    asyncio.run(run())
    lives = Lives()
    for record in TraceReader(str(path)):
        lives.follow(record)
    (life,) = lives.all
    assert life.arrival.ids == ("a-0", "the client's")
    assert life.num_output_tokens >= 1
    assert life.ending is None
