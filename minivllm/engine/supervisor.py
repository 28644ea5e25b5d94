"""Keeps an engine process running: when it dies or hangs, those who wait are told, and another is started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Protocol

from minivllm.config import EngineConfig
from minivllm.engine.client import EngineClient
from minivllm.engine.messages import StepEvents
from minivllm.errors import EngineRestartingError, ShuttingDownError, StartupError
from minivllm.request import DEFAULT_TERMS, EngineEvent, EngineInfo, EngineStats, SamplingParams, Terms

logger = logging.getLogger(__name__)

LONGEST_DELAY = 30.0
"""Seconds before another try, at the most."""
START_PATIENCE = 10.0, 60.0
"""What an engine that replaces another may take to start: so many times what the first took, and at least so
many seconds. After that it counts as hung."""
HOPELESS_AFTER = 3
"""Failures in a row after which the server no longer calls itself healthy; it goes on trying."""


class Observer(Protocol):
    """Who is told what the engines do, as it happens."""

    def step_done(self, step: StepEvents) -> None:
        """What a step brought, before anybody else sees it."""

    def engine_lost(self) -> None:
        """An engine has ended, and what it ran with it."""

    def engine_restarted(self) -> None:
        """Another can serve."""


class SupervisedEngine:
    """An :class:`EngineClient` that is replaced when its process ends.

    The first replacement starts at once. Engines that don't start, or die before they have finished a
    request, are waited for: 0.5 s, then twice as long each time, up to :data:`LONGEST_DELAY`.

    :meth:`spawn` it, :meth:`start` it, and always :meth:`close` it, all on one event loop.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._observers: list[Observer] = []
        self._is_closed = False
        self._supervision: asyncio.Task[None] | None = None
        self.num_restarts = 0
        """Engines that were started after the first."""
        self.num_failures = 0
        """Engines in a row that didn't start, or ended before they had finished a request."""
        self.info: EngineInfo

    @classmethod
    async def spawn(cls) -> SupervisedEngine:
        """Start an engine process. It imports torch at once, and waits for :meth:`start`."""
        return cls(await EngineClient.spawn())

    async def start(self, config: EngineConfig, *, stall_timeout: float) -> None:
        """Have the process load a model, wait until it can serve, and watch it from then on.

        Args:
            stall_timeout: seconds without a step, while there is work, after which the process counts as
                hung and is killed.

        Raises:
            StartupError: it can't.
        """
        start = time.monotonic()
        await self._client.start(config, stall_timeout=stall_timeout)
        factor, least = START_PATIENCE
        start_timeout = max(factor * (time.monotonic() - start), least)
        self.info = self._client.info
        self._supervision = asyncio.create_task(self._supervise(config, stall_timeout, start_timeout))

    def observe(self, observer: Observer) -> None:
        """Tell ``observer`` from now on."""
        self._observers.append(observer)
        self._client.on_step = self._step_done

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served at this moment."""
        return not self._is_closed and self._client.is_ready

    @property
    def is_hopeless(self) -> bool:
        """Whether restarts have failed so often that somebody should look."""
        return self.num_failures >= HOPELESS_AFTER

    @property
    def stats(self) -> EngineStats:
        """The engine's counts after its last step; those since start-up begin anew with each process."""
        return self._client.stats

    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        terms: Terms = DEFAULT_TERMS,
    ) -> AsyncGenerator[EngineEvent, None]:
        """:meth:`EngineClient.generate` of the engine that runs now.

        Raises:
            EngineRestartingError: none does at this moment.
            ShuttingDownError: :meth:`close` was called.
        """
        self.check_alive()
        return self._client.generate(request_id, prompt_token_ids, sampling, terms)

    def check_alive(self) -> None:
        """Raise why no request can be served, if none can."""
        if self._is_closed:
            raise ShuttingDownError("the server was stopped")
        if not self.is_alive:
            raise EngineRestartingError("the engine is being restarted; try again in a few seconds")

    async def close(self) -> None:
        """Stop the engine process, whatever it is doing, and fail what still waits for it."""
        self._is_closed = True
        if self._supervision is not None:
            self._supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervision
        await self._client.close()

    def _step_done(self, step: StepEvents) -> None:
        for observer in self._observers:
            observer.step_done(step)

    async def _supervise(self, config: EngineConfig, stall_timeout: float, start_timeout: float) -> None:
        while True:
            await self._client.wait_until_dead()  # by then its requests have failed
            self.num_failures = 0 if self._client.has_finished_any else self.num_failures + 1
            logger.error("%s; starting another", self._client.death)
            for observer in self._observers:
                observer.engine_lost()
            await self._client.close()
            await self._replace(config, stall_timeout, start_timeout)

    async def _replace(self, config: EngineConfig, stall_timeout: float, start_timeout: float) -> None:
        """Start engines until one can serve."""
        while True:
            await asyncio.sleep(_delay(self.num_failures))
            start = time.monotonic()
            try:
                self._client = await EngineClient.spawn()
                await self._client.start(config, stall_timeout=stall_timeout, start_timeout=start_timeout)
            except Exception as error:  # whatever it is: nobody else would try again
                self.num_failures += 1
                await self._client.close()  # the one before once more, where none came in its place
                logger.error(
                    "the engine can't be started again: %s; next try in %g s",
                    error,
                    _delay(self.num_failures),
                    exc_info=not isinstance(error, StartupError),
                )
            else:
                self.num_restarts += 1
                self._client.on_step = self._step_done
                for observer in self._observers:
                    observer.engine_restarted()
                logger.info("the engine serves again after %.2f s", time.monotonic() - start)
                return


def _delay(num_failures: int) -> float:
    """Seconds to wait after so many failures in a row; none after one, which may be chance."""
    return 0.0 if num_failures <= 1 else min(0.5 * 2.0 ** (num_failures - 2), LONGEST_DELAY)
