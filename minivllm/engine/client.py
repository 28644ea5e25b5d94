"""The asyncio side of the engine process: start it, send requests, receive events, notice its death."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable

import msgspec
import zmq
import zmq.asyncio

from minivllm.child import child_environment
from minivllm.config import EngineConfig
from minivllm.engine import messages
from minivllm.errors import (
    DeadlineError,
    EngineDeadError,
    InvalidRequestError,
    MessageError,
    MinivllmError,
    RequestFailedError,
    ShuttingDownError,
    StartupError,
)
from minivllm.request import (
    DEFAULT_TERMS,
    EngineEvent,
    EngineInfo,
    EngineStats,
    FinishReason,
    SamplingParams,
    Terms,
)

_DEADLINE_GRACE = 0.5  # seconds after which an engine that doesn't end a late request itself isn't waited for
_LONGEST_SOCKET_DIRECTORY = 80  # a Unix socket's path has at most about 100 bytes


class EngineClient:
    """A running engine process: :meth:`spawn` it, :meth:`start` it, and always :meth:`close` it.

    Everything here runs on one event loop.
    """

    info: EngineInfo
    on_step: Callable[[messages.StepEvents], None] | None = None
    """Called with each step's message before anybody else sees its events."""

    def __init__(self, directory: str, process: asyncio.subprocess.Process) -> None:
        self._directory = directory
        self._process = process
        self._context = zmq.asyncio.Context()
        self._events = self._context.socket(zmq.PULL)
        self._events.set_hwm(0)
        self._events.bind(f"ipc://{directory}/events")
        # Sending is immediate and never waits, so that an abort can be sent from anywhere.
        self._requests = zmq.Context(self._context).socket(zmq.PUSH)
        self._requests.set_hwm(0)
        self._requests.connect(f"ipc://{directory}/requests")
        self._queues: dict[str, asyncio.Queue[EngineEvent | MinivllmError]] = {}
        self._stats = EngineStats.of_nothing()
        self._unfinished: set[str] = set()  # what the engine has got, and hasn't ended, read or not
        self._last_sign = 0.0  # when it made a step, or got work while it had none
        self._fault: str | None = None  # for which it was killed
        self._stall_timeout = 0.0
        self.has_finished_any = False
        """Whether it has brought any request to its end."""
        self._tasks: list[asyncio.Task[None]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._is_closed = False

    @classmethod
    async def spawn(cls) -> EngineClient:
        """Start an engine process. It imports torch at once, and waits for :meth:`start`.

        Raises:
            StartupError: the system has no process, file or disk space for it.
        """
        try:
            directory = tempfile.mkdtemp(prefix="minivllm-")  # mode 0700
            if len(directory) > _LONGEST_SOCKET_DIRECTORY:
                os.rmdir(directory)
                directory = tempfile.mkdtemp(prefix="minivllm-", dir="/tmp")
        except OSError as error:
            raise StartupError(f"can't make a folder for the engine's sockets: {error}") from None
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *(["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []),
                "-m",
                "minivllm.engine.process",
                directory,
                stdin=asyncio.subprocess.PIPE,
                env=child_environment(),
            )
        except BaseException as error:
            shutil.rmtree(directory)
            if isinstance(error, OSError):
                raise StartupError(f"can't start the engine process: {error}") from None
            raise
        try:
            return cls(directory, process)
        except zmq.ZMQError as error:
            process.kill()
            await process.wait()
            shutil.rmtree(directory, ignore_errors=True)
            raise StartupError(f"can't open the engine's sockets: {error}") from None

    async def start(
        self, config: EngineConfig, *, stall_timeout: float, start_timeout: float | None = None
    ) -> None:
        """Have the process load a model, and wait until it can serve.

        Args:
            stall_timeout: seconds without a step, while there is work, after which the process is killed.
            start_timeout: seconds after which this no longer waits; None: never.

        Raises:
            StartupError: it can't; the message is the engine's own.
        """
        self._stall_timeout = stall_timeout
        stdin = self._process.stdin
        if stdin is None:
            raise StartupError("the engine process has no standard input")
        stdin.write(msgspec.json.encode(config) + b"\n")
        died = asyncio.create_task(self._process.wait())
        first = asyncio.ensure_future(self._events.recv())
        try:
            done, _ = await asyncio.wait(
                {died, first}, timeout=start_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise StartupError(f"the engine process hangs: it can't serve after {start_timeout:.0f} s")
            if not first.done():
                await asyncio.wait({first}, timeout=1.0)  # its last words may still be on the way
            if not first.done():
                raise StartupError(
                    f"the engine process ended with code {self._process.returncode} before it could serve"
                )
        finally:
            died.cancel()
            first.cancel()
        try:
            message = messages.decode_from_engine(first.result())
        except MessageError as error:
            raise StartupError(str(error)) from None
        if isinstance(message, messages.StartFailed):
            raise StartupError(message.message)
        if isinstance(message, messages.Ready):
            self.info, self._stats = message.info, message.stats
        self._watcher = asyncio.create_task(self._watch())
        self._tasks = [asyncio.create_task(self._receive()), self._watcher]

    @property
    def is_alive(self) -> bool:
        """Whether the engine process runs and hasn't been given up."""
        return not self._is_closed and self._fault is None and self._process.returncode is None

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.is_alive and bool(self._tasks)

    async def wait_until_dead(self) -> None:
        """Return when the process has ended, by itself or because it hung, and its requests have failed."""
        assert self._watcher is not None
        await asyncio.shield(self._watcher)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._queues)

    @property
    def stats(self) -> EngineStats:
        """The engine's counts after its last step."""
        return self._stats

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        terms: Terms = DEFAULT_TERMS,
    ) -> AsyncGenerator[EngineEvent, None]:
        """Run one request that :func:`minivllm.request.check_request` has let through.

        Yields its events; the last has a ``finish_reason``. Leaving the iterator before that (close
        it, or be cancelled) aborts the request, and its blocks are free within a step.

        Raises:
            InvalidRequestError: what the request asks for turned out to be too much.
            RequestFailedError: the engine failed while it computed this request.
            DeadlineError: it wasn't finished within ``terms.timeout``.
            EngineDeadError: the engine process died.
            ShuttingDownError: :meth:`close` was called.
        """
        if not self.is_alive:
            raise self.death
        queue: asyncio.Queue[EngineEvent | MinivllmError] = asyncio.Queue()
        self._queues[request_id] = queue
        late = DeadlineError("the request wasn't finished within the timeout that it gave")
        timer: asyncio.TimerHandle | None = None
        if terms.timeout is not None:  # the engine sees to it between its steps, but one may be long, or hang
            loop = asyncio.get_running_loop()
            timer = loop.call_later(terms.timeout + _DEADLINE_GRACE, queue.put_nowait, late)
        is_finished = False
        try:
            self._send(messages.AddRequest(request_id, prompt_token_ids, sampling, terms))
            if not self._unfinished:
                self._last_sign = time.monotonic()
            self._unfinished.add(request_id)
            while not is_finished:
                event = await queue.get()
                if isinstance(event, MinivllmError):
                    raise event
                is_finished = event.finish_reason is not None
                if event.finish_reason is FinishReason.TIMEOUT:
                    raise late
                if event.is_refusal:
                    raise InvalidRequestError(event.error or "the engine refused the request")
                if event.finish_reason is FinishReason.ERROR:
                    raise RequestFailedError(f"the engine failed on this request: {event.error}")
                yield event
        finally:
            if timer is not None:
                timer.cancel()
            del self._queues[request_id]
            if not is_finished and self.is_alive:
                self._send(messages.AbortRequest(request_id))

    async def close(self) -> None:
        """Stop the engine process, whatever it is doing, and fail what still waits for it."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        self._fail_all()
        self._requests.close(linger=0)
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _receive(self) -> None:
        while True:
            try:
                message = messages.decode_from_engine(await self._events.recv())
            except MessageError as error:
                self._kill(str(error))
                return
            if isinstance(message, messages.StepEvents):
                self._stats = message.stats
                self._last_sign = time.monotonic()
                if self.on_step is not None:
                    self.on_step(message)
                for event in message.events:
                    if event.finish_reason is not None:
                        self.has_finished_any = True
                        self._unfinished.discard(event.request_id)
                    # An aborted request's last events find nobody.
                    if event.request_id in self._queues:
                        self._queues[event.request_id].put_nowait(event)

    async def _watch(self) -> None:
        stall_timeout = self._stall_timeout
        interval = min(1.0, stall_timeout / 4)
        died = asyncio.create_task(self._process.wait())
        try:
            while not died.done():
                before = time.monotonic()
                await asyncio.wait({died}, timeout=interval)
                # While this process stood still itself (Ctrl-Z, docker pause), it could see no sign of life.
                overslept = max(time.monotonic() - before - interval, 0.0)
                self._last_sign = min(self._last_sign + overslept, time.monotonic())
                has_stalled = bool(self._unfinished) and time.monotonic() - self._last_sign > stall_timeout
                if has_stalled and self.is_alive:
                    self._kill(f"the engine process made no step for {stall_timeout:g} s while it had work")
        finally:
            died.cancel()
        self._fail_all()

    def _kill(self, fault: str) -> None:
        """Give the process up. :meth:`_watch` sees it end, and fails what waits for it."""
        self._fault = fault
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _fail_all(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait(self.death)

    @property
    def death(self) -> MinivllmError:
        """Why it serves no more."""
        if self._is_closed:
            return ShuttingDownError("the server was stopped before this request was finished")
        if self._fault is not None:
            return EngineDeadError(f"{self._fault}, and was killed")
        return EngineDeadError(f"the engine process ended with code {self._process.returncode}")

    def _send(self, message: messages.ToEngine) -> None:
        self._requests.send(messages.encode(message), zmq.NOBLOCK)
