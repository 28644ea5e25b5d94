"""A process that tries grammars, each in a child of its own: what it does can hurt nobody.

``grammar_check.py`` starts it as ``python -m minivllm.server.grammar_worker``. On standard input it gets
frames of msgpack, each after its length (4 bytes, little-endian): first a :class:`Table`, then
:class:`Trial`s. To standard output it writes a line of JSON, a :class:`Verdict`, for each trial, in
whichever order they end. It ends when standard input does.

A child is a fork: it has llguidance's tables without building them, and the kernel takes back whatever it
uses. A grammar that takes too long is killed, one that makes llguidance overflow its stack (a chain of a
thousand references does) kills its child alone.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from minivllm.errors import InvalidRequestError
from minivllm.structured import Vocabulary, run_in_deep_thread, try_grammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_CPU_SECONDS = 1.0
"""Of one child; what it does takes milliseconds as a rule."""
MAX_SECONDS = 20
"""By the clock, of one child on a machine that is busy with other things."""
_SIGNALS_FROM_OUTSIDE = (signal.SIGALRM, signal.SIGKILL)  # the machine was busy, or short of memory
_MAX_BYTES = 2**31
_STACK_SIZE = 2**23  # the engine's threads have several times as much: what passes here can't overflow there


class Table(msgspec.Struct):
    """A model's vocabulary."""

    tokens: list[bytes]
    special_token_ids: list[int]


class Trial(msgspec.Struct):
    """A grammar to try."""

    id: int
    grammar: str


class Verdict(msgspec.Struct):
    """What came of it: ``error`` is None where the grammar can be served."""

    id: int
    error: str | None
    is_cut_short: bool = False
    """Whether the trial was ended for what isn't the grammar's fault: nothing is known of it."""


def main() -> None:
    """Serve until standard input ends."""
    pipe = sys.stdin.buffer
    frame = _read_frame(pipe)
    if frame is None:
        return
    table = msgspec.msgpack.decode(frame, type=Table)
    # What ends an answer doesn't matter to whether its grammar can be compiled.
    eos = table.special_token_ids[:1] or [0]
    tokenizer = Vocabulary(table.tokens, special_token_ids=table.special_token_ids, eos_token_ids=eos).build()
    running: dict[int, int] = {}

    def reap(*_: Any) -> None:
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            trial_id = running.pop(pid)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) in _SIGNALS_FROM_OUTSIDE:
                _write(Verdict(trial_id, None, is_cut_short=True))
            elif status != 0:
                _write(
                    Verdict(trial_id, "the grammar is too complex: it can't be compiled within the limits")
                )

    signal.signal(signal.SIGCHLD, reap)
    while (frame := _read_frame(pipe)) is not None:
        trial = msgspec.msgpack.decode(frame, type=Trial)
        # The child may end before it is noted.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            _run(tokenizer, trial)
        running[pid] = trial.id
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def _run(tokenizer: LLTokenizer, trial: Trial) -> None:
    """The child's whole life."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
        signal.alarm(MAX_SECONDS)
        os.nice(10)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)  # a crash's last words are the client's business, not the operator's
        error = None
        try:
            run_in_deep_thread(lambda: try_grammar(tokenizer, trial.grammar), stack_size=_STACK_SIZE)
        except InvalidRequestError as refusal:
            error = refusal.message
        _write(Verdict(trial.id, error))
        status = 0
    finally:
        os._exit(status)


def _read_frame(pipe: BinaryIO) -> bytes | None:
    length = pipe.read(4)
    return None if len(length) < 4 else pipe.read(int.from_bytes(length, "little"))


def _write(verdict: Verdict) -> None:
    # Below PIPE_BUF, and so in one piece, whoever else writes at the same time.
    line = msgspec.json.encode(verdict) + b"\n"
    os.write(1, line)


if __name__ == "__main__":
    main()
