"""``minivllm serve`` and ``python -m minivllm.serve``: HTTP in this process, the engine in another."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from minivllm import cli
from minivllm.config import EngineConfig, ServerConfig
from minivllm.engine.supervisor import SupervisedEngine
from minivllm.errors import ConfigError
from minivllm.flags import Parser
from minivllm.server.keys import ApiKeys, load_api_keys
from minivllm.server.record import OnRequestEnd
from minivllm.server.request_id import RequestIdFilter
from minivllm.server.request_log import RequestLog
from minivllm.server.tls import check_tls
from minivllm.terminal import configure_logging
from minivllm.tokenizer.load import load_tokenizer
from minivllm.weights.files import resolve_model

if TYPE_CHECKING:
    from minivllm.server.admission import WaitingRoom

logger = logging.getLogger("minivllm.serve")  # __name__ may be "__main__" here

LAST_READ_SECONDS = 5
"""So long clients have to read what has been answered, when the server ends."""


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit code."""
    started = time.monotonic()
    parser = Parser("minivllm serve", "Serve a model behind OpenAI routes.")
    parser.add_config(EngineConfig, "engine")
    parser.add_config(ServerConfig, "server")
    parser.add_preset()
    parsed = parser.parse(argv)
    engine_config = parser.make_config(EngineConfig, parsed)
    server_config = parser.make_config(ServerConfig, parsed)
    _configure_logging()
    _allow_more_files()
    api_keys = load_api_keys(server_config, os.environ)
    check_tls(server_config)
    try:
        asyncio.run(serve(engine_config, server_config, api_keys, started))
    except asyncio.CancelledError:
        logger.warning("stopped at once")
        return 1
    return 0


def _configure_logging() -> None:
    handler = configure_logging()
    handler.addFilter(RequestIdFilter())
    # uvicorn's warnings are what anybody on the network can cause, a line for each malformed request.
    http_logger = logging.getLogger("uvicorn")
    http_logger.handlers = [handler]
    http_logger.setLevel(logging.ERROR)
    http_logger.propagate = False


def _allow_more_files() -> None:
    """Each connection is an open file, and shells often allow 1,024, which a program may raise by itself."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS: "unlimited" is refused
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def serve(
    engine_config: EngineConfig, server_config: ServerConfig, api_keys: ApiKeys | None, started: float
) -> None:
    """Start the engine, then the HTTP server; on a signal drain, then stop both.

    A signal during start-up ends it, and a second one cancels this at once.

    Raises:
        StartupError: the port, the model, a flag or the memory is not as it must be.
    """
    signals = _Signals()
    try:
        await _serve(engine_config, server_config, api_keys, started, signals)
    except asyncio.CancelledError:
        if not signals.is_first_of_start_up:
            raise
        logger.info("stopped before it could serve")


async def _serve(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    api_keys: ApiKeys | None,
    started: float,
    signals: _Signals,
) -> None:
    with _observers(server_config) as observers, contextlib.closing(_bind(server_config)) as listener:
        if api_keys is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            logger.warning(
                "no --api-key: whoever reaches %s can use the model", server_config.host or "any interface"
            )
        engine = await SupervisedEngine.spawn()
        try:
            # Imported while the engine process imports torch: it takes half a second.
            from minivllm.server.admission import WaitingRoom
            from minivllm.server.app import create_app
            from minivllm.server.context import ServerState
            from minivllm.server.debug import RecentSteps
            from minivllm.server.http11 import uvicorn_config
            from minivllm.server.metrics import ServerMetrics

            files = await asyncio.to_thread(
                resolve_model,
                engine_config.model,
                revision=engine_config.revision,
                load_format=engine_config.load_format,
            )
            template = None if server_config.chat_template is None else Path(server_config.chat_template)
            tokenizer, _ = await asyncio.gather(
                asyncio.to_thread(load_tokenizer, files, chat_template=template),
                engine.start(
                    replace(engine_config, model=str(files.path), revision=None),
                    stall_timeout=server_config.engine_stall_timeout,
                ),
            )
            state, room = ServerState(), WaitingRoom.of(server_config)
            name = server_config.served_model_name or files.name
            metrics = ServerMetrics(
                server_config.metrics_prefix,
                name,
                engine.info,
                engine.stats,
                config=engine_config,
                is_alive=lambda: engine.is_alive,
            )
            engine.observe(metrics)
            recent_steps = RecentSteps() if engine_config.debug_routes else None
            if recent_steps is not None:
                engine.observe(recent_steps)
            app = create_app(
                engine,
                tokenizer,
                server_config,
                name,
                state,
                api_keys,
                metrics=metrics,
                room=room,
                on_request_end=observers,
                recent_steps=recent_steps,
            )
            # The answers are complete by then, or have failed: only slow readers are waited for, who are cut
            # off before uvicorn would cancel their requests.
            http = _HttpServer(uvicorn_config(app, server_config, 2 * LAST_READ_SECONDS))
            # What start-up made stays: no collection walks over it while streams wait, and what requests
            # leave behind is collected soon, not when it has come to a quarter of all that.
            gc.freeze()
            serving = asyncio.create_task(http.serve(sockets=[listener]))
            try:
                await _unless_it_fails(serving, http.is_listening.wait())
            except OSError as error:  # another server has bound the same port, and listened first
                raise _cannot_listen(server_config, error) from None
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            seconds = time.monotonic() - started
            scheme = "http" if server_config.ssl_certfile is None else "https"
            logger.info("serving %s on %s://%s:%d after %.2f s", name, scheme, host, port, seconds)
            await _unless_it_fails(serving, signals.wait_for_stop())

            state.is_draining = True
            await _drain(room, engine, server_config.shutdown_timeout)
            http.should_exit = True
            await serving
        finally:
            await engine.close()


@contextlib.contextmanager
def _observers(config: ServerConfig) -> Iterator[list[OnRequestEnd]]:
    """Who is told what became of each HTTP request, as the flags say."""
    with contextlib.ExitStack() as stack:
        observers: list[OnRequestEnd] = []
        if config.request_log is not None:
            observers.append(stack.enter_context(contextlib.closing(RequestLog(config.request_log))))
        if config.otlp_endpoint is not None:
            from minivllm.server.spans import Spans

            observers.append(stack.enter_context(contextlib.closing(Spans(config.otlp_endpoint))))
        yield observers


async def _unless_it_fails(serving: asyncio.Task[None], waiting: Coroutine[Any, Any, object]) -> None:
    """Wait, but not for ever when the HTTP server has ended meanwhile: raise why."""
    waiter = asyncio.create_task(waiting)
    try:
        await asyncio.wait((serving, waiter), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
    if serving.done():
        serving.result()


async def _drain(room: WaitingRoom, engine: SupervisedEngine, seconds: float) -> None:
    """Let the requests that have come finish; after ``seconds``, end them with an error."""
    logger.info("stopping: %d requests have up to %g s to finish", room.num_requests, seconds)
    if room.num_requests == 0:  # with 0 s, wait_for doesn't look
        return
    try:
        await asyncio.wait_for(room.wait_until_empty(), seconds)
    except TimeoutError:
        logger.warning("%d requests did not finish in time", room.num_requests)
        await engine.close()


class _Signals:
    """SIGTERM and Ctrl-C: the first asks for a drain, any other cancels the task that made this object."""

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._is_serving = False
        self._num_received = 0
        self._stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._handle)

    async def wait_for_stop(self) -> None:
        """Return when the first signal comes. Before this is called there is nothing to drain."""
        self._is_serving = True
        await self._stop.wait()

    @property
    def is_first_of_start_up(self) -> bool:
        """Whether a single signal has come, and before there was anything to drain."""
        return self._num_received == 1 and not self._is_serving

    def _handle(self) -> None:
        self._num_received += 1
        if self._is_serving and not self._stop.is_set():
            self._stop.set()
        elif self._task is not None:
            self._task.cancel()


def _bind(config: ServerConfig) -> socket.socket:
    """Take the port before anything slow is done. Connections are refused until the model is ready."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # By its full name: where the protocol is left open, asyncio doesn't see that this is TCP and leaves
    # Nagle's algorithm on, which holds an answer's second packet back for up to 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(config, error) from None
    return listener


def _cannot_listen(config: ServerConfig, error: OSError) -> ConfigError:
    # A name that nobody knows, or an address of another machine: no port helps.
    is_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
    advice = "--host" if is_host else "--port, or 0 for any free one"
    return ConfigError(
        f"can't listen on {config.host} port {config.port}: {error.strerror}; choose another {advice}"
    )


class _HttpServer(uvicorn.Server):
    """uvicorn, but the signals are ours: it would refuse connections while we still answer them with 503."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(LAST_READ_SECONDS, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        """Close the connections of clients that don't read. Their requests end as if they had left."""
        if connections := list(self.server_state.connections):
            logger.warning("%d clients didn't read their answers and are cut off", len(connections))
        for connection in connections:
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


if __name__ == "__main__":
    sys.exit(cli.run("serve", sys.argv[1:]))
