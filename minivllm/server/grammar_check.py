"""Whether a request's grammar can be served: asked of a process of its own, once for each grammar."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future

import msgspec

from minivllm.child import child_environment
from minivllm.errors import InvalidRequestError, RequestFailedError
from minivllm.server.grammar_worker import MAX_SECONDS, Table, Trial, Verdict
from minivllm.tokenizer.tokenizer import Tokenizer

_NUM_REMEMBERED = 1024
"""Grammars whose verdicts are kept."""
_MAX_TRIALS = 4
"""Most children at once: a flood of grammars must not take the machine from those who are served."""


class GrammarChecker:
    """Tries grammars before the engine meets them. :meth:`check` belongs to one event loop.

    The process is started for the first grammar, and again if it should ever die.

    Args:
        tokenizer: the model's.
        vocab_size: rows of the model's embedding.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._verdicts: OrderedDict[bytes, asyncio.Task[str | None]] = OrderedDict()
        self._trials = asyncio.Semaphore(_MAX_TRIALS)
        self._worker: _Worker | None = None
        self._worker_lock = threading.Lock()

    async def check(self, grammar: str, param: str | None) -> None:
        """Return if the grammar can be served.

        Raises:
            InvalidRequestError: it can't, and why; ``param`` names the field that it came in.
            RequestFailedError: nobody knows: the process died, or took too long. Another try may tell.
        """
        key = hashlib.sha256(grammar.encode()).digest()
        verdict = self._verdicts.get(key)
        if verdict is None or verdict.cancelled() or (verdict.done() and verdict.exception() is not None):
            verdict = self._verdicts[key] = asyncio.create_task(self._try(grammar))
            verdict.add_done_callback(_take_note)
            if len(self._verdicts) > _NUM_REMEMBERED:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        # A client that goes away must not take the verdict from others who wait for it.
        error = await asyncio.shield(verdict)
        if error is not None:
            raise InvalidRequestError(error, param=param)

    def close(self) -> None:
        """End the process, if there is one. Another :meth:`check` would start a new one."""
        with self._worker_lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    async def _try(self, grammar: str) -> str | None:
        async with self._trials:
            try:
                return await asyncio.wait_for(self._ask(grammar), 2 * MAX_SECONDS)
            except TimeoutError:
                # It ends each trial in time, so it stands still itself. Who else waits for it fails with it.
                if self._worker is not None:
                    self._worker.kill()
                raise RequestFailedError(
                    f"the grammar couldn't be tried within {2 * MAX_SECONDS} s; try again"
                ) from None

    async def _ask(self, grammar: str) -> str | None:
        # In a thread, which waits for as long as a process that stands still leaves its pipe full.
        return await asyncio.wrap_future(await asyncio.to_thread(self._submit, grammar))

    def _submit(self, grammar: str) -> Future[str | None]:
        with self._worker_lock:
            if self._worker is None or not self._worker.is_alive:
                self._worker = _Worker()
                self._worker.send(self._table())
            return self._worker.submit(grammar)

    def _table(self) -> Table:
        tokens = [self._tokenizer.token_bytes(token_id) for token_id in range(self._vocab_size)]
        special = sorted(i for i in self._tokenizer.special_token_ids if i < self._vocab_size)
        return Table(tokens, special)


def _take_note(verdict: asyncio.Task[str | None]) -> None:
    """Of an error, too, for which nobody may wait any more: asyncio would log it."""
    if not verdict.cancelled():
        verdict.exception()


class _Worker:
    """The process, with a thread that reads what it says. Its :class:`Table` must be sent first."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minivllm.server.grammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            # The terminal's Ctrl-C is for the server, which lets requests end.
            start_new_session=True,
        )
        self._ids = itertools.count()
        self._waiting: dict[int, Future[str | None]] = {}
        self._reader = threading.Thread(target=self._read, name="grammar-verdicts", daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None and self._reader.is_alive()

    def submit(self, grammar: str) -> Future[str | None]:
        """One caller at a time."""
        trial_id, answer = next(self._ids), Future[str | None]()
        self._waiting[trial_id] = answer
        self.send(Trial(trial_id, grammar))
        return answer

    def kill(self) -> None:
        """End it from any thread. What it was trying fails."""
        self._process.kill()

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def send(self, message: Table | Trial) -> None:
        """One caller at a time. Waits while the process takes nothing; :meth:`kill` ends that."""
        frame = msgspec.msgpack.encode(message)
        if self._process.stdin is not None:
            try:
                self._process.stdin.write(len(frame).to_bytes(4, "little") + frame)
                self._process.stdin.flush()
            except OSError:
                self._fail_all()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            verdict = msgspec.json.decode(line, type=Verdict)
            answer = self._waiting.pop(verdict.id, None)
            if answer is None or answer.done():
                continue
            if verdict.is_cut_short:
                answer.set_exception(
                    RequestFailedError("the grammar's trial was cut short by a busy machine; try again")
                )
            else:
                answer.set_result(verdict.error)
        self._fail_all()

    def _fail_all(self) -> None:
        for trial_id in list(self._waiting):
            answer = self._waiting.pop(trial_id, None)  # the other thread may fail them, too
            if answer is not None and not answer.done():
                answer.set_exception(RequestFailedError("the process that checks grammars died; try again"))
