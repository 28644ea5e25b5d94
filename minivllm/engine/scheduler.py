"""Who runs in the next step, and with how many tokens.

A step is a list of (request, number of new tokens). Prefill chunks and decodes mix freely inside
one token budget (Agrawal et al. 2023, "Sarathi": chunked prefill), decodes first, so that a long
prompt never stalls the others. When blocks run out, the most recently admitted sequence is evicted
and computed again later (Kwon et al. 2023, section 4.5: recomputation).

A step's life is schedule → execute → advance → update. On a GPU the next step is scheduled between
the last two: a sequence then ends in :data:`PENDING_TOKEN` until ``update`` brings its token.

Admission is first come, first served among requests of one priority. To try another policy, subclass
:class:`Scheduler` and override :meth:`~Scheduler.limit_reached`, or :meth:`~Scheduler.schedule` as a whole.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.waiting import WaitingQueue
from minivllm.request import PENDING_TOKEN, EngineEvent, FinishReason, Request, TokenLogprob


@dataclass(eq=False, slots=True, init=False)
class ScheduledRequest:
    """``num_tokens`` uncomputed tokens of one request go through the model in this step."""

    request: Request
    num_tokens: int
    start: int
    """Position of the first of them."""
    is_sampled: bool
    """Whether these are the sequence's last tokens, so that the next one is sampled."""
    prompt_logprobs: list[TokenLogprob] | None
    """From the runner, where asked for: how likely the prompt's tokens are that come after these."""

    def __init__(self, request: Request, num_tokens: int) -> None:
        self.request = request
        self.num_tokens = num_tokens
        self.start = request.num_computed_tokens
        self.is_sampled = self.start + num_tokens == len(request.token_ids)
        self.prompt_logprobs = None


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step: who runs, and how many tokens each."""

    requests: list[ScheduledRequest]
    num_admitted: int = 0
    """So many, the last of them, have just been admitted."""
    evicted: Sequence[tuple[Request, int]] = ()
    """Who lost their blocks for it, and how many computed tokens."""
    waits_for: str | None = None
    """Why the first in the queue isn't among them: the limit that is reached, ``"blocks"`` where none are
    free, ``"last_token"`` where its last token is on its way. None if nobody waits."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole step."""
        return sum(item.num_tokens for item in self.requests)

    def sampled_requests(self) -> list[Request]:
        """The requests that get a token in this step, in batch order."""
        return [item.request for item in self.requests if item.is_sampled]

    @property
    def reads_output(self) -> bool:
        """Whether sampling needs to know tokens that the step before may not have brought yet."""
        return any(item.request.sampling.reads_output for item in self.requests)


@dataclass(slots=True)
class SampledToken:
    """What the runner chose for one request."""

    token_id: int
    logprob: TokenLogprob | None = None
    error: str | None = None
    """Why there is none: the request ends with this, and the others go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What bounds a step, and a request."""

    max_num_seqs: int
    """Most sequences that run at once."""
    max_num_batched_tokens: int
    """Most tokens in one step."""
    num_parallel: int = 1
    """Most sequences that the sequential scheduler runs at once."""
    eos_token_ids: frozenset[int] = frozenset()
    """Ids that end a request, unless it has ``ignore_eos``."""


class Scheduler(ABC):
    """The queues, and the life of a request in them: waiting → running (→ waiting)* → finished."""

    def __init__(
        self,
        block_manager: BlockManager,
        limits: SchedulerLimits,
        clock: Callable[[], float] = time.monotonic,
        waiting: WaitingQueue | None = None,
    ) -> None:
        self.block_manager = block_manager
        self.limits = limits
        self.clock = clock
        self.max_num_batched_tokens = limits.max_num_batched_tokens
        """Most tokens in the next step: fewer than the limit once a step didn't fit into memory."""
        self.waiting = WaitingQueue() if waiting is None else waiting
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0

    @abstractmethod
    def limit_reached(self) -> str | None:
        """The limit that keeps one more sequence from running, as far as the policy goes; None if it may.

        Blocks and the step's tokens are checked besides.
        """

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Let a new request wait for its turn."""
        sampling = request.sampling
        # A grammar's mask lets the end of a turn through where nothing else can follow.
        ignores_eos = sampling.ignore_eos and sampling.grammar is None
        eos_token_ids = frozenset() if ignores_eos else self.limits.eos_token_ids
        request.end_token_ids = eos_token_ids.union(sampling.stop_token_ids)
        self.waiting.add(request)

    def abort(self, request: Request) -> EngineEvent:
        """End a waiting or running request now; its blocks are free when this returns."""
        return self._finish(request, [], FinishReason.ABORT)

    def refuse(self, request: Request, error: str) -> EngineEvent:
        """End a waiting or running request that can't be served after all, for what it asks."""
        return self._finish(request, [], FinishReason.ERROR, error=error, is_refusal=True)

    def expire(self, request: Request) -> EngineEvent:
        """End a waiting or running request whose deadline has passed."""
        return self._finish(request, [], FinishReason.TIMEOUT)

    def schedule(self) -> ScheduledBatch:
        """Choose the next step's work and allocate its blocks.

        Empty only if there is no work, or if all that runs waits for tokens of the step before.
        """
        budget = self.max_num_batched_tokens
        grow, commit = self.block_manager.grow, self.block_manager.commit
        scheduled: dict[Request, ScheduledRequest] = {}
        evicted: list[tuple[Request, int]] = []

        # In order of admission, and that is decodes first: whoever is still in its prompt is the last,
        # because the next one is only admitted with what its prompt leaves of the budget.
        for request in list(self.running):
            if budget == 0:
                break
            num_known = len(request.token_ids)
            if not request.block_table or num_known >= request.max_total_tokens:
                continue  # evicted a moment ago, by another in this loop; or its last token is pending
            num_tokens = min(num_known - request.num_computed_tokens, budget)
            while not grow(request, num_tokens):
                victim = self.running.pop()  # not one of those that are scheduled: it came after them
                evicted.append((victim, victim.num_computed_tokens))
                self._preempt(victim)
                if victim is request:
                    break
            else:
                scheduled[request] = ScheduledRequest(request, num_tokens)
                budget -= num_tokens
        for item in scheduled.values():
            commit(item.request, item.num_tokens)

        num_kept, waits_for = len(scheduled), None
        while self.waiting:
            request = self.waiting.first()
            waits_for = self._admit(request, budget)
            if waits_for is not None:
                break
            self.waiting.remove(request)
            self.running.append(request)
            if request.metrics.first_scheduled_time == 0.0:
                request.metrics.first_scheduled_time = self.clock()
                request.metrics.num_cached_tokens = request.num_computed_tokens
                self.waiting.charge_prompt(request)
            num_tokens = min(request.num_uncomputed_tokens, budget)
            scheduled[request] = ScheduledRequest(request, num_tokens)
            commit(request, num_tokens)  # the next one may begin alike
            budget -= num_tokens

        return ScheduledBatch(list(scheduled.values()), len(scheduled) - num_kept, evicted, waits_for)

    def _admit(self, request: Request, budget: int) -> str | None:
        """Give the first in the queue its blocks, or say what it waits for."""
        limit = self.limit_reached()
        if limit is not None:
            return limit
        if budget == 0:
            return "max_num_batched_tokens"
        if request.has_all_tokens:
            return "last_token"
        # A block stays free for each running sequence: admitting into the last ones would only
        # evict somebody within the next steps, and its prefill would be for nothing.
        return None if self.block_manager.admit(request, headroom=len(self.running)) else "blocks"

    def advance(self, batch: ScheduledBatch) -> None:
        """Note that the step has been started: the tokens that it samples are pending."""
        for item in batch.requests:
            if item.is_sampled:
                item.request.token_ids.append(PENDING_TOKEN)

    def update(self, batch: ScheduledBatch, sampled: list[SampledToken | None]) -> list[EngineEvent]:
        """Put what the step sampled in the places of its pending tokens, and free what it finished.

        Args:
            batch: what :meth:`schedule` returned, advanced.
            sampled: one for each request of the batch; None where its prompt isn't through yet.

        Returns:
            One event for each request that got a token, and one without tokens for each whose prompt was
            begun and isn't through yet. A request that has ended since gets none.
        """
        events = []
        self.waiting.charge_outputs(item.request for item in batch.requests if item.is_sampled)
        for item, token in zip(batch.requests, sampled, strict=True):
            request = item.request
            if request.is_finished:
                continue
            if item.prompt_logprobs is not None:
                request.prompt_logprobs[item.start :] = item.prompt_logprobs
            if token is None:
                if item.start == request.metrics.num_cached_tokens:
                    events.append(EngineEvent(request.request_id, []))  # it doesn't wait any more
                continue
            if token.error is not None:
                events.append(self.refuse(request, token.error))
                continue
            num_tokens = item.start + item.num_tokens + 1
            request.token_ids[num_tokens - 1] = token.token_id
            if request.metrics.first_token_time == 0.0:
                request.metrics.first_token_time = self.clock()
            logprobs = None if token.logprob is None else [token.logprob]
            num_output_tokens = num_tokens - len(request.prompt_token_ids)
            if token.token_id in request.end_token_ids and self._may_end(request, num_output_tokens, token):
                event = self._finish(request, [token.token_id], FinishReason.STOP, logprobs=logprobs)
            elif num_tokens >= request.max_total_tokens:
                event = self._finish(request, [token.token_id], FinishReason.LENGTH, logprobs=logprobs)
            else:
                event = EngineEvent(request.request_id, [token.token_id], logprobs)
            if num_output_tokens == 1:
                event.metrics = request.metrics
                if request.sampling.prompt_logprobs is not None:
                    event.prompt_logprobs = request.prompt_logprobs
            events.append(event)
        return events

    def _may_end(self, request: Request, num_output_tokens: int, token: SampledToken) -> bool:
        """Whether an end token ends the request, or was only drawn because nothing else was left."""
        if request.sampling.grammar is not None and token.token_id in self.limits.eos_token_ids:
            return True  # the grammar's mask lets none through that comes too early
        return num_output_tokens > request.sampling.min_tokens  # the sampler masks them before that

    def take_back(self, batch: ScheduledBatch) -> list[tuple[Request, int]]:
        """Evict the requests of a step that couldn't run: they are computed again in others.

        All of them lose their blocks, since one may share what another was to compute in that step.

        Returns:
            As :attr:`ScheduledBatch.evicted`.
        """
        self._roll_back(batch)
        requests = {item.request for item in batch.requests}
        evicted = [(r, r.num_computed_tokens) for r in reversed(self.running) if r in requests]
        for request, _ in evicted:
            self.running.remove(request)
            self._preempt(request)
        return evicted

    def _roll_back(self, batch: ScheduledBatch) -> None:
        for item in batch.requests:
            if not item.request.is_finished and item.request.block_table:
                self.block_manager.roll_back(item.request, item.start)

    def fail(self, batch: ScheduledBatch, error: str) -> list[EngineEvent]:
        """End the requests of a step that raised; nobody else is touched."""
        self._roll_back(batch)
        # One that ended or was evicted while the step ran has left blocks there that the step didn't write.
        self.block_manager.forget_prefixes()
        items = [item for item in batch.requests if not item.request.is_finished]
        return [self._finish(item.request, [], FinishReason.ERROR, error=error) for item in items]

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues and block manager agree on who runs."""
        self.block_manager.check_integrity()
        consistent = (
            not set(self.running) & set(self.waiting)
            and all(request.block_table for request in self.running)
            and not any(request.block_table for request in self.waiting)
            and (self.running or self.block_manager.num_used_blocks == 0)
        )
        if not consistent:
            raise AssertionError("queues and block tables disagree")

    def _preempt(self, victim: Request) -> None:
        self.block_manager.free(victim)
        victim.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add_evicted(victim)

    def _finish(
        self,
        request: Request,
        new_token_ids: list[int],
        reason: FinishReason,
        *,
        logprobs: list[TokenLogprob] | None = None,
        error: str | None = None,
        is_refusal: bool = False,
    ) -> EngineEvent:
        """Take a request out of its queue and free its blocks, which a running step may still write to."""
        if request.block_table:
            self.running.remove(request)
            self.block_manager.free(request)
        else:
            self.waiting.remove(request)
        request.is_finished = True
        request.metrics.finished_time = self.clock()
        metrics = request.metrics
        return EngineEvent(
            request.request_id, new_token_ids, logprobs, reason, error, metrics, is_refusal=is_refusal
        )


class ContinuousScheduler(Scheduler):
    """Continuous batching (Yu et al. 2022, "Orca"): sequences join and leave at every step."""

    def limit_reached(self) -> str | None:
        return "max_num_seqs" if len(self.running) >= self.limits.max_num_seqs else None


class SequentialScheduler(Scheduler):
    """The Ollama-style baseline: at most ``num_parallel`` sequences run; the next waits until one ends."""

    def limit_reached(self) -> str | None:
        if len(self.running) >= self.limits.num_parallel:
            return "num_parallel"
        return "max_num_seqs" if len(self.running) >= self.limits.max_num_seqs else None
