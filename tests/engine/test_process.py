"""The engine in its own process: same tokens, prompt aborts, no idle CPU, and no orphan or hang on death."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from minivllm.config import EngineConfig
from minivllm.engine.client import EngineClient
from minivllm.engine.startup import build_engine
from minivllm.errors import (
    DeadlineError,
    EngineDeadError,
    InvalidRequestError,
    ShuttingDownError,
    StartupError,
)
from minivllm.request import FinishReason, SamplingParams, Terms
from minivllm.weights.files import resolve_model
from tests.conftest import run_all, until
from tests.tiny_model import write_tiny_model

LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model=write_tiny_model(tmp_path), load_format="dummy", device="cpu", kv_cache_memory=2**22
    )


@asynccontextmanager
async def running(config: EngineConfig, stall_timeout: float = 60.0) -> AsyncIterator[EngineClient]:
    client = await EngineClient.spawn()
    try:
        await client.start(config, stall_timeout=stall_timeout)
        yield client
    finally:
        await client.close()


async def tokens_of(
    client: EngineClient, request_id: str, prompt: list[int], sampling: SamplingParams
) -> list[int]:
    return [
        token
        async for event in client.generate(request_id, prompt, sampling)
        for token in event.new_token_ids
    ]


def process_id(client: EngineClient) -> int:
    return client._process.pid


def test_tokens_equal_the_engine_s_in_this_process(config: EngineConfig) -> None:
    prompts = [list(range(5, 5 + n)) for n in (1, 16, 40, 100)]
    engine = build_engine(config, resolve_model(config.model, load_format="dummy"))
    expected = run_all(engine, prompts, SHORT)

    async def served() -> list[list[int]]:
        async with running(config) as client:
            assert client.info == engine.info
            tasks = [tokens_of(client, str(i), prompt, SHORT) for i, prompt in enumerate(prompts)]
            return await asyncio.gather(*tasks)

    assert asyncio.run(served()) == expected


def test_leaving_early_frees_the_blocks(config: EngineConfig) -> None:
    async def leave_while_others_run() -> None:
        async with running(config) as client:
            other = asyncio.create_task(tokens_of(client, "other", [7] * 30, LONG))
            async with aclosing(client.generate("left", [5] * 100, LONG)) as events:
                async for _ in events:
                    assert client.stats.num_used_blocks >= 7
                    break
            await until(lambda: client.stats.num_running == 1)
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)
            await until(lambda: client.stats.num_running == 0)
            assert client.stats.num_used_blocks == 0
            assert client.num_requests == 0
            assert len(await tokens_of(client, "next", [5] * 100, SHORT)) == 20

    asyncio.run(leave_while_others_run())


def test_what_the_engine_refuses_is_the_request_s_fault(config: EngineConfig) -> None:
    async def ask() -> None:
        async with running(config) as client:
            sampling = SamplingParams(max_tokens=5, grammar="start: nothing")
            with pytest.raises(InvalidRequestError):
                await tokens_of(client, "a", [5] * 40, sampling)
            assert len(await tokens_of(client, "b", [5] * 40, SHORT)) == 20

    asyncio.run(ask())


def test_finished_requests_carry_their_history(config: EngineConfig) -> None:
    async def finish() -> None:
        async with running(config) as client:
            events = [event async for event in client.generate("a", [5] * 40, SHORT)]
            assert [event.finish_reason for event in events] == [None] * 19 + [FinishReason.LENGTH]
            metrics = events[-1].metrics
            assert metrics is not None
            times = [
                metrics.arrival_time,
                metrics.first_scheduled_time,
                metrics.first_token_time,
                metrics.finished_time,
            ]
            assert times == sorted(times)
            assert times[0] > 0

    asyncio.run(finish())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_an_idle_engine_takes_its_memory(config: EngineConfig) -> None:
    """All of the KV pool's, before anybody asks for a token; and it answers as ever."""

    def resident(client: EngineClient) -> int:
        pages = int(Path(f"/proc/{process_id(client)}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def idle() -> tuple[int, list[int]]:
        async with running(replace(config, kv_cache_memory=2**30)) as client:
            for _ in range(2000):
                if resident(client) > 2**30:
                    break
                await asyncio.sleep(0.01)
            return resident(client), await tokens_of(client, "a", [5] * 40, SHORT)

    async def small() -> list[int]:
        async with running(config) as client:
            return await tokens_of(client, "a", [5] * 40, SHORT)

    taken, tokens = asyncio.run(idle())
    assert taken > 2**30
    assert tokens == asyncio.run(small())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU time from /proc")
def test_an_idle_engine_uses_no_cpu(config: EngineConfig) -> None:
    def cpu_ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    async def idle() -> int:
        async with running(config) as client:
            await tokens_of(client, "a", [5] * 40, SHORT)
            for _ in range(5):  # torch's threads spin for a moment after their last work
                before = cpu_ticks(process_id(client))
                await asyncio.sleep(1.0)
                used = cpu_ticks(process_id(client)) - before
                if used == 0:
                    break
            return used

    assert asyncio.run(idle()) == 0


def test_the_sockets_are_private_and_go_away(config: EngineConfig) -> None:
    def check(directory: Path) -> None:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert {path.name for path in directory.iterdir()} == {"events", "requests"}

    async def look() -> Path:
        async with running(config) as client:
            check(Path(client._directory))
            return Path(client._directory)

    assert not asyncio.run(look()).exists()


def test_a_killed_engine_fails_what_waits_for_it(config: EngineConfig) -> None:
    async def kill() -> None:
        async with running(config) as client:
            waiting = [asyncio.create_task(tokens_of(client, str(i), [5] * 20, LONG)) for i in range(3)]
            await until(lambda: client.stats.num_running > 0)
            os.kill(process_id(client), signal.SIGKILL)
            for result in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(result, EngineDeadError)
                assert "-9" in str(result)
            assert not client.is_alive
            with pytest.raises(EngineDeadError):
                await tokens_of(client, "late", [5], SHORT)

    asyncio.run(kill())


def test_a_request_out_of_time_fails_and_frees_its_blocks(config: EngineConfig) -> None:
    async def run() -> None:
        async with running(config) as client:
            sampling = replace(LONG, max_tokens=4000)
            with pytest.raises(DeadlineError):
                async for _ in client.generate("late", [5] * 20, sampling, Terms(timeout=0.05)):
                    pass
            await until(lambda: client.stats.num_used_blocks == 0)
            assert client.num_requests == 0

    asyncio.run(run())


def test_a_request_out_of_time_does_not_wait_for_an_engine_that_hangs(config: EngineConfig) -> None:
    async def run() -> None:
        async with running(config) as client:
            os.kill(process_id(client), signal.SIGSTOP)
            with pytest.raises(DeadlineError):
                async for _ in client.generate("late", [5] * 20, LONG, Terms(timeout=0.05)):
                    pass
            assert client.num_requests == 0
            os.kill(process_id(client), signal.SIGCONT)
            assert len(await tokens_of(client, "next", [5] * 20, SHORT)) == SHORT.max_tokens
            assert client.stats.num_used_blocks == 0

    asyncio.run(run())


def test_a_request_that_cannot_be_sent_is_not_waited_for(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(message: object) -> None:
        raise zmq.ZMQError

    async def run() -> None:
        async with running(config) as client:
            with monkeypatch.context() as patched:
                patched.setattr(client, "_send", fail)
                with pytest.raises(zmq.ZMQError):
                    await tokens_of(client, "a", [5] * 20, SHORT)
            assert client.num_requests == 0
            assert len(await tokens_of(client, "b", [5] * 20, SHORT)) == SHORT.max_tokens

    asyncio.run(run())


def stand_still(seconds: float) -> None:
    """With the whole event loop."""
    time.sleep(seconds)


def test_time_in_which_the_server_stands_still_is_no_stall(config: EngineConfig) -> None:
    """Both processes are stopped, as by Ctrl-Z or ``docker pause``, for longer than the engine may hang."""

    async def run() -> None:
        async with running(config, stall_timeout=6.0) as client:
            tokens = asyncio.create_task(tokens_of(client, "a", [5] * 20, replace(LONG, max_tokens=2000)))
            await until(lambda: client.stats.num_running > 0)
            os.kill(process_id(client), signal.SIGSTOP)
            await asyncio.sleep(0.5)  # what it has sent before arrives
            stand_still(8)
            os.kill(process_id(client), signal.SIGCONT)
            assert len(await tokens) == 2000

    asyncio.run(run())


def test_an_answer_that_nobody_reads_is_no_stall(config: EngineConfig) -> None:
    """The engine has done its work; its client is the one who is slow."""

    async def run() -> None:
        async with running(config, stall_timeout=2.0) as client:
            events = client.generate("a", [5] * 20, SHORT)
            num_tokens = len((await anext(events)).new_token_ids)
            await until(lambda: client.has_finished_any)
            await asyncio.sleep(4)  # twice as long as it may do nothing while there is work
            async for event in events:
                num_tokens += len(event.new_token_ids)
            assert num_tokens == SHORT.max_tokens
            assert client.is_alive

    asyncio.run(run())


def test_an_engine_that_hangs_is_killed_though_its_clients_have_left(config: EngineConfig) -> None:
    async def run() -> None:
        async with running(config, stall_timeout=2.0) as client:
            os.kill(process_id(client), signal.SIGSTOP)
            waiting = asyncio.create_task(tokens_of(client, "a", [5] * 20, SHORT))
            await until(lambda: client.num_requests == 1)
            waiting.cancel()
            await until(lambda: not client.is_alive)
            assert "no step for 2 s" in str(client.death)

    asyncio.run(run())


def test_closing_fails_what_runs(config: EngineConfig) -> None:
    async def close() -> None:
        async with running(config) as client:
            waiting = asyncio.create_task(tokens_of(client, "a", [5] * 20, LONG))
            await until(lambda: client.stats.num_running > 0)
            await client.close()
            with pytest.raises(ShuttingDownError):
                await waiting

    asyncio.run(close())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/nowhere"}, "/nowhere"),
        ({"max_model_len": 100_000}, "--max-model-len must be at most 4096"),
        ({"kv_cache_memory": 10}, "--kv-cache-memory to 4096"),
    ],
)
def test_why_it_cannot_start(config: EngineConfig, settings: dict[str, object], message: str) -> None:
    async def start() -> None:
        async with running(replace(config, **settings)):
            pytest.fail("it started")

    with pytest.raises(StartupError, match=message):
        asyncio.run(start())


def test_an_engine_whose_parent_dies_early_ends(tmp_path: Path) -> None:
    """Before it has got a configuration: it doesn't wait for anybody to hear that it can't start."""
    directory = tmp_path / "sockets"
    directory.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "minivllm.engine.process", str(directory)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert result.returncode == 1
    assert not directory.exists()


PARENT = """
import asyncio, sys
from minivllm.config import EngineConfig
from minivllm.engine.client import EngineClient

async def main():
    client = await EngineClient.spawn()
    config = EngineConfig(model=sys.argv[1], load_format="dummy", device="cpu", kv_cache_memory=2**22)
    await client.start(config, stall_timeout=60.0)
    print(client._process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_engine_ends_with_its_parent(config: EngineConfig) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(config.model)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        os.kill(engine, 0)
    finally:
        parent.kill()
        parent.wait()
    for _ in range(3000):
        try:
            os.kill(engine, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{engine}/stat").exists() and ") Z " in Path(f"/proc/{engine}/stat").read_text():
            return  # ended; nobody has collected it yet
        time.sleep(0.01)
    pytest.fail("the engine outlives its parent")
