"""The engine in a process of its own, with its own interpreter lock: what runs in the child.

``client.py`` starts it as ``python -m minivllm.engine.process DIR`` and writes the configuration,
one line of JSON, to its standard input. That pipe then stays open as a lifeline: when the parent
dies, however it dies, the pipe closes and the engine ends. Messages travel over two ``ipc://``
sockets in DIR, which only this user can enter.
"""

from __future__ import annotations

import gc
import logging
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import zmq

from minivllm.config import EngineConfig
from minivllm.engine import messages
from minivllm.engine.steps import StepRecord
from minivllm.errors import InvalidRequestError, MessageError, StartupError
from minivllm.openmp import spin_briefly
from minivllm.request import EngineEvent, FinishReason
from minivllm.terminal import configure_logging
from minivllm.weights.files import resolve_model

if TYPE_CHECKING:
    from minivllm.engine.engine import Engine

logger = logging.getLogger("minivllm.engine.process")  # __name__ is "__main__" here

LAST_WORDS_MS = 5000
"""How long the engine waits at its end for the parent to take what it has sent: the parent may be gone."""


def main(directory: str) -> int:
    """Build an engine and serve it until the parent goes. Returns the exit code."""
    # The terminal's Ctrl-C and a supervisor's SIGTERM reach the whole group, but the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging()
    spin_briefly()
    context = zmq.Context()
    context.linger = LAST_WORDS_MS
    try:
        return _run(context, directory)
    finally:
        context.destroy()
        shutil.rmtree(directory, ignore_errors=True)  # the parent would, but it may have been killed


def _run(context: zmq.Context[zmq.Socket[bytes]], directory: str) -> int:
    requests = context.socket(zmq.PULL)
    requests.bind(f"ipc://{directory}/requests")
    events = context.socket(zmq.PUSH)
    events.set_hwm(0)  # a client that is slow for a moment must not stop the engine
    events.connect(f"ipc://{directory}/events")
    try:
        records: list[StepRecord] = []
        engine = _build(records)
    except StartupError as error:
        events.send(messages.encode(messages.StartFailed(str(error))))
        return 1
    except Exception as error:
        logger.exception("the engine can't start")
        events.send(messages.encode(messages.StartFailed(f"{type(error).__name__}: {error}")))
        return 1
    gc.freeze()  # what start-up made stays: no collection walks over it in the middle of a step
    events.send(messages.encode(messages.Ready(engine.info, engine.stats())))
    try:
        serve(engine, requests, events, records)
    except MessageError as error:
        logger.error("%s", error)
        return 1
    events.close(linger=0)  # nobody is left to hear of the last steps
    return 0


def _build(records: list[StepRecord]) -> Engine:
    """The engine, which puts its steps into ``records`` if it is asked for them."""
    start = time.monotonic()
    # Seconds of importing torch, while the parent still looks for the model's files.
    from minivllm.engine.startup import build_engine, stage

    logger.info("torch imported: %.2f s", time.monotonic() - start)
    line = sys.stdin.buffer.readline()
    if not line:
        raise StartupError("the parent process ended")
    config = msgspec.json.decode(line, type=EngineConfig)
    with stage("model files read"):
        files = resolve_model(config.model, revision=config.revision, load_format=config.load_format)
    return build_engine(config, files, [records.append] if config.debug_routes else ())


def serve(
    engine: Engine,
    requests: zmq.Socket[bytes],
    events: zmq.Socket[bytes],
    records: list[StepRecord],
) -> None:
    """Take messages and step until standard input closes.

    While there is no work it prepares for more, and then sleeps, using no CPU.

    Raises:
        MessageError: the parent sent what can't be read.
    """
    lifeline = sys.stdin.fileno()
    poller = zmq.Poller()
    poller.register(requests, zmq.POLLIN)
    poller.register(lifeline, zmq.POLLIN)
    while True:
        has_work = engine.has_work
        ready = dict(poller.poll(0 if has_work or engine.prepare() else None))
        if lifeline in ready:
            return
        if not (ready or has_work):
            continue
        out: list[EngineEvent] = []
        while requests.poll(0):
            out += _handle(engine, messages.decode_to_engine(requests.recv()))
        out += engine.step()
        events.send(messages.encode(messages.StepEvents(out, engine.stats(), records)))
        records.clear()


def _handle(engine: Engine, message: messages.ToEngine) -> list[EngineEvent]:
    if isinstance(message, messages.AbortRequest):
        event = engine.abort(message.request_id)
        return [] if event is None else [event]
    try:
        engine.add(message.request_id, message.prompt_token_ids, message.sampling, message.terms)
    except InvalidRequestError as error:
        reason, text = FinishReason.ERROR, str(error)
        return [EngineEvent(message.request_id, [], finish_reason=reason, error=text, is_refusal=True)]
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
