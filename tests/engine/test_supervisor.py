"""An engine that dies or hangs is replaced, and nobody who waits for it hangs."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from minivllm.config import EngineConfig
from minivllm.engine import supervisor
from minivllm.engine.client import EngineClient
from minivllm.engine.messages import StepEvents
from minivllm.engine.supervisor import HOPELESS_AFTER, SupervisedEngine
from minivllm.errors import EngineDeadError, EngineRestartingError, ShuttingDownError
from minivllm.request import SamplingParams
from tests.conftest import until
from tests.tiny_model import write_tiny_model

from .test_process import LONG, SHORT


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model=write_tiny_model(tmp_path), load_format="dummy", device="cpu", kv_cache_memory=2**22
    )


@asynccontextmanager
async def supervised(config: EngineConfig, stall_timeout: float = 60.0) -> AsyncIterator[SupervisedEngine]:
    engine = await SupervisedEngine.spawn()
    try:
        await engine.start(config, stall_timeout=stall_timeout)
        yield engine
    finally:
        await engine.close()


async def tokens_of(engine: SupervisedEngine, request_id: str, sampling: SamplingParams) -> list[int]:
    events = engine.generate(request_id, [5] * 20, sampling)
    return [token async for event in events for token in event.new_token_ids]


def pid_of(engine: SupervisedEngine) -> int:
    return engine._client._process.pid


def directory_of(engine: SupervisedEngine) -> Path:
    return Path(engine._client._directory)


async def fail(engine: SupervisedEngine, signal_number: int, reason: str) -> None:
    """Send the engine process a signal while three requests run, and wait until it is replaced."""
    waiting = [asyncio.create_task(tokens_of(engine, str(i), LONG)) for i in range(3)]
    await until(lambda: engine.stats.num_running == 3)
    pid, directory = pid_of(engine), directory_of(engine)
    os.kill(pid, signal_number)
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, EngineDeadError)
        assert reason in str(result)
    assert not engine.is_alive
    with pytest.raises(EngineRestartingError):
        await tokens_of(engine, "late", SHORT)
    await until(lambda: engine.is_alive)
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_engine_is_replaced_every_time(config: EngineConfig) -> None:
    async def run() -> None:
        async with supervised(config) as engine:
            expected = await tokens_of(engine, "a", SHORT)
            for number in (1, 2):
                await fail(engine, signal.SIGKILL, "code -9")
                assert engine.num_restarts == number
                assert await tokens_of(engine, "a", SHORT) == expected
                assert engine.stats.num_running == 0

    asyncio.run(run())


def test_an_engine_that_hangs_is_killed_and_replaced(config: EngineConfig) -> None:
    async def run() -> None:
        async with supervised(config, stall_timeout=2) as engine:
            await fail(engine, signal.SIGSTOP, "no step for 2 s")
            assert len(await tokens_of(engine, "b", SHORT)) == SHORT.max_tokens

    asyncio.run(run())


def test_an_engine_that_hangs_while_it_starts_is_replaced(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would never be done: the next try is what serves again."""
    monkeypatch.setattr(supervisor, "START_PATIENCE", (3.0, 0.0))

    async def run() -> None:
        async with supervised(config) as engine:
            first = pid_of(engine)
            os.kill(first, signal.SIGKILL)
            await until(lambda: pid_of(engine) != first)
            second = pid_of(engine)
            os.kill(second, signal.SIGSTOP)
            await until(lambda: engine.is_alive)
            assert pid_of(engine) not in (first, second)
            with pytest.raises(ProcessLookupError):
                os.kill(second, 0)
            assert len(await tokens_of(engine, "a", SHORT)) == SHORT.max_tokens

    asyncio.run(run())
    assert "can't be started again: the engine process hangs: it can't serve after" in caplog.text


def test_an_idle_engine_has_not_stalled(config: EngineConfig) -> None:
    async def run() -> None:
        async with supervised(config, stall_timeout=1.5) as engine:
            pid = pid_of(engine)
            await asyncio.sleep(3)  # twice as long as it may do nothing while there is work
            assert len(await tokens_of(engine, "b", SHORT)) == SHORT.max_tokens
            assert pid_of(engine) == pid

    asyncio.run(run())


def test_without_its_model_it_tries_again_until_there_is_one(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    delays: list[int] = []

    def no_delay(num_failures: int) -> float:
        delays.append(num_failures)
        return 0.0

    monkeypatch.setattr(supervisor, "_delay", no_delay)
    model = tmp_path / "moving"
    shutil.copytree(str(config.model), model)

    async def run() -> None:
        async with supervised(replace(config, model=str(model))) as engine:
            model.rename(tmp_path / "away")
            os.kill(pid_of(engine), signal.SIGKILL)
            await until(lambda: engine.is_hopeless)
            assert not engine.is_alive
            (tmp_path / "away").rename(model)
            await until(lambda: engine.is_alive)
            await tokens_of(engine, "a", SHORT)
            os.kill(pid_of(engine), signal.SIGKILL)
            await until(lambda: engine.num_restarts == 2)
            assert not engine.is_hopeless

    asyncio.run(run())
    assert str(model) in caplog.text
    assert delays[: 2 * HOPELESS_AFTER : 2] == [1, 2, 3]


def test_engines_that_finish_nothing_are_hopeless(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps alone are no success."""
    monkeypatch.setattr(supervisor, "_delay", lambda num_failures: 0.01)

    async def run() -> None:
        async with supervised(config) as engine:
            for number in range(1, HOPELESS_AFTER + 1):
                assert not engine.is_hopeless
                waiting = asyncio.create_task(tokens_of(engine, "a", replace(LONG, max_tokens=4000)))
                await until(lambda: engine.stats.num_running == 1)
                os.kill(pid_of(engine), signal.SIGKILL)
                with pytest.raises(EngineDeadError):
                    await waiting
                await until(lambda number=number: engine.num_restarts == number)
            assert engine.num_failures == HOPELESS_AFTER == 3
            assert engine.is_hopeless

    asyncio.run(run())


class CountingObserver:
    """Counts what it is told."""

    num_steps = num_lost = num_restarted = 0

    def step_done(self, step: StepEvents) -> None:
        self.num_steps += 1

    def engine_lost(self) -> None:
        self.num_lost += 1

    def engine_restarted(self) -> None:
        self.num_restarted += 1


def test_an_observer_sees_the_steps_of_every_engine(config: EngineConfig) -> None:
    async def run() -> None:
        async with supervised(config) as engine:
            observer = CountingObserver()
            engine.observe(observer)
            await tokens_of(engine, "a", SHORT)
            before = observer.num_steps
            assert before > 0
            os.kill(pid_of(engine), signal.SIGKILL)
            await until(lambda: observer.num_restarted == 1)
            assert observer.num_lost == 1
            await tokens_of(engine, "a", SHORT)
            assert observer.num_steps > before

    asyncio.run(run())


def test_delays_grow_up_to_a_limit() -> None:
    assert [supervisor._delay(n) for n in range(10)] == [0, 0, 0.5, 1, 2, 4, 8, 16, 30, 30]


def test_closing_while_it_restarts(config: EngineConfig) -> None:
    async def run() -> None:
        async with supervised(config) as engine:
            os.kill(pid_of(engine), signal.SIGKILL)
            await until(lambda: not engine.is_alive)
            await engine.close()
            with pytest.raises(ShuttingDownError):
                await tokens_of(engine, "late", SHORT)
            pid = pid_of(engine)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(run())


def test_a_system_without_room_for_a_process_is_waited_for(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """No disk space for sockets, then no more processes: it goes on when there are again."""
    monkeypatch.setattr(supervisor, "_delay", lambda num_failures: 0.01)

    async def run() -> None:
        async with supervised(config) as engine:
            expected = await tokens_of(engine, "a", SHORT)
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
            os.kill(pid_of(engine), signal.SIGKILL)
            await until(lambda: "for the engine's sockets" in caplog.text)
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
            python = sys.executable
            monkeypatch.setattr(sys, "executable", "/nowhere/python")
            await until(lambda: "can't start the engine process" in caplog.text)
            assert not any(name.startswith("minivllm-") for name in os.listdir(tmp_path))
            monkeypatch.setattr(sys, "executable", python)
            await until(lambda: engine.is_alive)
            assert await tokens_of(engine, "a", SHORT) == expected

    asyncio.run(run())


def test_what_nobody_foresaw_is_a_failed_try(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "_delay", lambda num_failures: 0.01)

    async def fail() -> EngineClient:
        raise RuntimeError("can't start new thread")

    async def run() -> None:
        async with supervised(config) as engine:
            with monkeypatch.context() as patched:
                patched.setattr(EngineClient, "spawn", fail)
                os.kill(pid_of(engine), signal.SIGKILL)
                await until(lambda: engine.is_hopeless)
            await until(lambda: engine.is_alive)
            assert len(await tokens_of(engine, "a", SHORT)) == SHORT.max_tokens

    asyncio.run(run())
    assert "can't be started again: can't start new thread" in caplog.text
    assert "Traceback" in caplog.text


def test_an_engine_of_another_version_is_replaced(config: EngineConfig) -> None:
    """What it sends can't be read, or what it gets: who waits is told, and nobody hangs."""

    async def run() -> None:
        async with supervised(config) as engine:
            for number, babble in enumerate((babble_to_server, babble_to_engine), start=1):
                waiting = asyncio.create_task(tokens_of(engine, "a", LONG))
                await until(lambda: engine.stats.num_running == 1)
                babble(engine)
                with pytest.raises(EngineDeadError):
                    await waiting
                await until(lambda number=number: engine.num_restarts == number)
                assert len(await tokens_of(engine, "b", SHORT)) == SHORT.max_tokens

    asyncio.run(run())


def babble_to_server(engine: SupervisedEngine) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(f"ipc://{directory_of(engine)}/events")
        socket.send(b"\x81\xa4type\xa5Later")


def babble_to_engine(engine: SupervisedEngine) -> None:
    engine._client._requests.send(b"\x81\xa4type\xa5Later")
