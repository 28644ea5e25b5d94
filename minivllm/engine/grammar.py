"""Where each answer stands in its grammar, and which tokens may come next.

Nothing here makes a step wait for long. Grammars are compiled in threads of their own, while their
requests wait and others run. A step's masks are computed in other threads while the model computes its
logits. A matcher follows the tokens that a request has, and reads those that are new to it just before
the next mask: an eviction changes nothing for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from minivllm.engine.sampler import TokenMask
from minivllm.errors import InvalidRequestError
from minivllm.request import Request
from minivllm.structured import (
    MASK_BURST_SECONDS,
    MASK_SECONDS_PER_TOKEN,
    Vocabulary,
    compile_grammar,
    describe,
)
from minivllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_NUM_COMPILED = 64
"""Compiled grammars that are kept for the requests to come."""
_NUM_COMPILERS = 2
_COMPILER_STACK, _MASKER_STACK = 2**28, 2**26  # llguidance recurs as deep as a grammar; pages come as touched


class GrammarState:
    """One request's place in its grammar."""

    def __init__(self, compiled: Future[LLMatcher]) -> None:
        self.compiled = compiled
        self._matcher: LLMatcher | None = None
        self._num_consumed = 0
        self._mask_seconds = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether the grammar is compiled, or can't be."""
        return self.compiled.done()

    @property
    def error(self) -> str | None:
        """Why the grammar can't be used. Only once it :attr:`is_ready`."""
        error = self.compiled.exception()
        return None if error is None else str(error)

    def fill_mask(
        self, request: Request, bits_B: npt.NDArray[np.uint8], eos_token_ids: frozenset[int]
    ) -> str | None:
        """Take in the request's new tokens, and set the bits of those that may come next.

        End-of-turn tokens that ``ignore_eos`` or ``min_tokens`` don't want are left out, unless nothing
        else can come: such an answer is over.

        Returns:
            None, or why the request can't go on.
        """
        start = time.thread_time()
        if self._matcher is None:
            self._matcher = self.compiled.result().deep_copy()
        matcher, params = self._matcher, request.sampling
        output = request.token_ids[request.num_prompt_tokens :]
        matcher.consume_tokens(output[self._num_consumed :])
        self._num_consumed = len(output)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(bits_B.ctypes.data, bits_B.nbytes)
        if matcher.is_error():
            return f"the grammar can't go on: {describe(matcher.get_error())}"
        is_early = len(output) < params.min_tokens
        if is_early or params.ignore_eos:
            unwanted = [*eos_token_ids, *(params.stop_token_ids if is_early else ())]
            allowed = bits_B.copy()
            for token_id in unwanted:
                bits_B[token_id // 8] &= 0xFF ^ (1 << token_id % 8)
            if not bits_B.any():
                bits_B[:] = allowed
        if not bits_B.any():
            return "the grammar has a dead end: no token of this model can go on"
        self._mask_seconds += time.thread_time() - start
        if self._mask_seconds > MASK_BURST_SECONDS + MASK_SECONDS_PER_TOKEN * len(output):
            return "the grammar is too complex: finding out which tokens may come next takes too long"
        return None


def wait_for_any(states: Iterable[GrammarState], *, timeout: float) -> None:
    """Return when one of them is ready, or after ``timeout`` seconds."""
    wait([state.compiled for state in states], timeout, return_when=FIRST_COMPLETED)


@dataclass(frozen=True, slots=True)
class PendingMask:
    """One step's masks, while they are computed."""

    _mask: TokenMask
    _errors: list[Future[list[str | None]]]

    def wait(self) -> tuple[TokenMask, dict[int, str]]:
        """The masks, and what went wrong, by row. A row that failed has a mask that allows anything."""
        errors = [error for future in self._errors for error in future.result()]
        failed = {}
        for row, bits_B, error in zip(self._mask.rows, self._mask.bits_RB, errors, strict=True):
            if error is not None:
                bits_B[:] = 0xFF
                failed[row] = error
        return self._mask, failed


class Grammars:
    """All that an engine knows of grammars. Costs nothing until the first request has one.

    Args:
        load_tokenizer: the model's; called once, in a thread.
        vocab_size: rows of the model's embedding.
        eos_token_ids: of the model.
    """

    def __init__(
        self, load_tokenizer: Callable[[], Tokenizer], *, vocab_size: int, eos_token_ids: Iterable[int]
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._num_bytes = (vocab_size + 31) // 32 * 4
        self._num_maskers = max(1, min(8, (os.cpu_count() or 1) // 2))
        self._compilers: ThreadPoolExecutor | None = None
        self._maskers: ThreadPoolExecutor | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()

    def begin(self, grammar: str) -> GrammarState:
        """The state of a new request, whose grammar may still be compiling."""
        if not self._eos_token_ids:
            raise InvalidRequestError(
                "this model has no end-of-turn token, so that no answer could end as its grammar wants",
                param="grammar",
            )
        if self._compilers is None:
            self._compilers = _start_threads("grammar", _NUM_COMPILERS, _COMPILER_STACK, _be_nice)
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compilers.submit(self._compile, grammar)
            self._compiled[grammar] = compiled
            if len(self._compiled) > _NUM_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return GrammarState(compiled)

    def start_mask(self, requests: list[Request]) -> PendingMask | None:
        """Begin to compute a step's masks, in threads; None where no request has a grammar.

        Args:
            requests: one for each row of the logits, all their tokens known.
        """
        rows = [row for row, request in enumerate(requests) if request.grammar is not None]
        if not rows:
            return None
        if self._maskers is None:
            self._maskers = _start_threads("mask", self._num_maskers, _MASKER_STACK)
        bits_RB = np.zeros((len(rows), self._num_bytes), dtype=np.uint8)
        asking = [requests[row] for row in rows]
        size = -(-len(rows) // self._num_maskers)
        errors = [
            self._maskers.submit(self._fill, asking[i : i + size], bits_RB[i : i + size])
            for i in range(0, len(rows), size)
        ]
        return PendingMask(TokenMask(rows, bits_RB), errors)

    def _fill(self, requests: list[Request], bits_RB: npt.NDArray[np.uint8]) -> list[str | None]:
        return [
            _fill_safely(request, bits_B, self._eos_token_ids)
            for request, bits_B in zip(requests, bits_RB, strict=True)
        ]

    def _compile(self, grammar: str) -> LLMatcher:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = self._vocabulary().build()
        matcher = compile_grammar(self._tokenizer, grammar)
        matcher.compute_bitmask()  # so that the copies have the first states of the lexer
        return matcher

    def _vocabulary(self) -> Vocabulary:
        tokenizer = self._load_tokenizer()
        return Vocabulary(
            [tokenizer.token_bytes(token_id) for token_id in range(self._vocab_size)],
            special_token_ids=tokenizer.special_token_ids,
            eos_token_ids=self._eos_token_ids,
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        )


def _fill_safely(
    request: Request, bits_B: npt.NDArray[np.uint8], eos_token_ids: frozenset[int]
) -> str | None:
    assert request.grammar is not None
    try:
        return request.grammar.fill_mask(request, bits_B, eos_token_ids)
    except Exception as error:  # it must end its own request, not the step
        return f"the grammar failed: {type(error).__name__}: {error}"


def _start_threads(
    name: str, num_threads: int, stack_size: int, initializer: Callable[[], None] | None = None
) -> ThreadPoolExecutor:
    """A pool whose threads run already, each with a stack of its own size."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=initializer)
    everyone = threading.Barrier(num_threads)
    before = threading.stack_size(stack_size)
    try:
        wait([pool.submit(everyone.wait) for _ in range(num_threads)])
    finally:
        threading.stack_size(before)
    return pool


def _be_nice() -> None:
    """Let the steps' threads go first, on Linux, where priorities are a thread's."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
