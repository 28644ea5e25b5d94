"""What ``/metrics`` tells, and where each number comes from.

Names, types, labels and buckets are vLLM's where the meaning is the same, under a prefix of their own
(``--metrics-prefix``); below vLLM's smallest buckets there are finer ones. ``docs/metrics.md`` is made from
the instruments here.

To add one: make it in :meth:`ServerMetrics.__init__`, and give it a method that says when it changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, ProcessCollector, generate_latest
from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from minivllm.config import BLOCK_SIZE, EngineConfig
from minivllm.engine.messages import StepEvents
from minivllm.errors import (
    DeadlineError,
    EngineDeadError,
    EngineRestartingError,
    MinivllmError,
    OverloadedError,
    RateLimitError,
    ShuttingDownError,
)
from minivllm.request import EngineEvent, EngineInfo, EngineStats, FinishReason
from minivllm.server.instruments import Counter, Gauge, Histogram, Instrument
from minivllm.server.record import RequestRecord

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SAMPLES = (1, 2, 5, 10, 20)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5)
FIRST_TOKEN_SECONDS = (*_FIRST_TOKEN, 10, 20, 40, 80, 160, 640, 2560)
_NEXT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
NEXT_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, *_NEXT_TOKEN)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, *_REQUEST)
FINER = "finer buckets below vLLM's"
BUSY_ERRORS = (
    OverloadedError,
    RateLimitError,
    EngineRestartingError,
    EngineDeadError,
    DeadlineError,
    ShuttingDownError,
)
"""What happens to requests that nothing is wrong with."""
COMPILING = "grammar"
WAITS_FOR = ("max_num_seqs", "num_parallel", "max_num_batched_tokens", "blocks", "last_token", COMPILING)
"""The scheduler's reasons (``ScheduledBatch.waits_for``), and that of those it doesn't know yet."""


def length_bounds(longest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... as far as ``longest``."""
    bounds = (digit * 10**power for power in range(len(str(longest))) for digit in (1, 2, 5))
    return [bound for bound in bounds if bound <= longest]


@dataclass(slots=True)
class Sequence:
    """One of the engine's requests, from when it is handed over until the engine's last event for it."""

    received_at: float
    """When its HTTP request was there."""
    num_prompt_tokens: int
    max_tokens: int | None
    num_tokens: int = 0
    last_token_at: float = 0.0
    has_stop_string: bool = False
    """Whether the server found one: the abort that it then sends the engine is an answer's proper end."""


class ServerMetrics(Collector):
    """The numbers of one server and its engine.

    Steps and requests are told to it on the event loop; gauges are read when somebody asks.

    Args:
        prefix: of all names.
        model_name: the label of that name.
        info: how long sequences can be.
        stats: the engine's, before its first step.
        config: the engine's, for ``cache_config_info``.
        is_alive: whether the engine is.
        clock: seconds, the engine's.
    """

    def __init__(
        self,
        prefix: str,
        model_name: str,
        info: EngineInfo,
        stats: EngineStats,
        *,
        config: EngineConfig | None = None,
        is_alive: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefix = prefix
        # vLLM counts its engines from 0; here there is one.
        self._labels = {"model_name": model_name, "engine": "0"}
        self._stats = stats
        self._is_alive = is_alive
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._registry = CollectorRegistry()
        lengths = length_bounds(info.max_model_len)

        self.engine_up = Gauge("engine_up", "1 while the engine process takes requests, else 0.", peer=None)
        self.engine_restarts = Counter(
            "engine_restarts", "Engine processes that were started after one had died or hung.", peer=None
        )
        self.num_requests_running = Gauge("num_requests_running", "Sequences in the engine's running batch.")
        self.num_requests_waiting = Gauge("num_requests_waiting", "Sequences that wait to be admitted.")
        self.num_requests_waiting_by_reason = Gauge(
            "num_requests_waiting_by_reason",
            "Sequences that wait to be admitted, by what the first in the queue waits for: the flag's limit, "
            "free KV blocks, its own last token; or by what they wait for themselves: a grammar, compiled.",
            labels=("reason",),
            known=[(reason,) for reason in WAITS_FOR],
            peer="vLLM's reasons are `capacity` and `deferred`",
        )
        self.kv_cache_usage_perc = Gauge(
            "kv_cache_usage_perc", "Share of the KV blocks that live sequences hold, from 0 to 1."
        )
        cache = _cache_labels(config or EngineConfig(), stats)
        self.cache_config_info = Gauge(
            "cache_config_info",
            "Always 1; the KV cache is in its labels.",
            labels=tuple(cache),
            known=[tuple(cache.values())],
            peer="fewer labels; `num_gpu_blocks` is said of CPUs, too, and `model_name` is there",
        )
        self.cache_config_info.set(1, *cache.values())

        self.prefix_cache_queries = Counter(
            "prefix_cache_queries", "Tokens of admitted sequences that were looked up in the prefix cache."
        )
        self.prefix_cache_hits = Counter(
            "prefix_cache_hits", "Tokens of admitted sequences that were found in the prefix cache."
        )
        self.num_preemptions = Counter(
            "num_preemptions", "How often a sequence was evicted, to be computed again."
        )
        self.prompt_tokens = Counter(
            "prompt_tokens", "Tokens of prompts, cached ones included, counted at the first token."
        )
        self.prompt_tokens_cached = Counter(
            "prompt_tokens_cached", "Tokens of prompts that the prefix cache brought."
        )
        self.generation_tokens = Counter("generation_tokens", "Tokens that were generated.")
        self.request_success = Counter(
            "request_success",
            "Sequences that ended, failed and aborted ones included.",
            labels=("finished_reason",),
            known=[(reason.value,) for reason in FinishReason],
            peer="`timeout` is ours alone, `repetition` vLLM's",
        )
        self.http_requests = Counter(
            "http_requests",
            "HTTP requests, by route and status; 499: the client left before there was an answer.",
            labels=("route", "status"),
            peer=None,
        )
        self.http_errors = Counter(
            "http_errors",
            "HTTP requests that were refused, or failed, by the code (or else the type) of their error.",
            labels=("code",),
            known=[(kind.code or "",) for kind in BUSY_ERRORS],
            peer=None,
        )

        self.iteration_tokens = Histogram(
            "iteration_tokens_total",
            "Tokens in one step of the engine.",
            STEP_TOKENS,
            peer="chunks of prompts count in their own steps, and so does what is computed again",
        )
        self.time_to_first_token = Histogram(
            "time_to_first_token_seconds",
            "From the HTTP request's arrival to its sequence's first token.",
            FIRST_TOKEN_SECONDS,
        )
        self.inter_token_latency = Histogram(
            "inter_token_latency_seconds",
            "From one token of a sequence to the next, as the server gets them.",
            NEXT_TOKEN_SECONDS,
            peer=FINER,
        )
        self.time_per_output_token = Histogram(
            "request_time_per_output_token_seconds",
            "A sequence's decode time over its tokens but the first.",
            NEXT_TOKEN_SECONDS,
            peer=FINER,
        )
        self.e2e_latency = Histogram(
            "e2e_request_latency_seconds",
            "From the HTTP request's arrival to its sequence's end.",
            REQUEST_SECONDS,
            peer=FINER,
        )
        self.queue_time = Histogram(
            "request_queue_time_seconds",
            "From the engine's first sight of a sequence to its first step, or to its end before that.",
            REQUEST_SECONDS,
            peer=FINER,
        )
        self.prefill_time = Histogram(
            "request_prefill_time_seconds",
            "From a sequence's first step to its first token.",
            REQUEST_SECONDS,
            peer=FINER,
        )
        self.decode_time = Histogram(
            "request_decode_time_seconds",
            "From a sequence's first token to its last.",
            REQUEST_SECONDS,
            peer=FINER,
        )
        self.inference_time = Histogram(
            "request_inference_time_seconds",
            "From a sequence's first step to its last token.",
            REQUEST_SECONDS,
            peer=FINER,
        )
        self.request_prompt_tokens = Histogram(
            "request_prompt_tokens", "Tokens in a sequence's prompt.", lengths
        )
        self.request_prefill_kv_computed_tokens = Histogram(
            "request_prefill_kv_computed_tokens",
            "Tokens of a sequence's prompt that the prefix cache did not bring.",
            lengths,
        )
        self.request_generation_tokens = Histogram(
            "request_generation_tokens", "Tokens that a sequence generated.", lengths
        )
        self.request_params_max_tokens = Histogram(
            "request_params_max_tokens", "Most tokens that a sequence might have generated.", lengths
        )
        self.request_params_n = Histogram(
            "request_params_n", "Samples per prompt of an HTTP request.", SAMPLES
        )
        self.request_max_num_generation_tokens = Histogram(
            "request_max_num_generation_tokens", "Tokens of an HTTP request's longest sample.", lengths
        )
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    @property
    def instruments(self) -> list[Instrument]:
        """All of them, in the order in which they are made."""
        return [value for value in vars(self).values() if isinstance(value, Instrument)]

    @contextmanager
    def following(
        self, request_id: str, num_prompt_tokens: int, max_tokens: int | None, received_at: float
    ) -> Iterator[Sequence]:
        """While the engine's request of that id is waited for: called before it is handed over.

        It is counted when the engine's last event for it comes, which after an abort is later than this
        ends; or when it fails in here without one.
        """
        sequence = self._sequences[request_id] = Sequence(received_at, num_prompt_tokens, max_tokens)
        try:
            yield sequence
        except MinivllmError:
            # The engine has died, or is being stopped: its last event won't come. Or it has come already.
            if self._sequences.pop(request_id, None) is not None:
                self._end(sequence, FinishReason.ERROR, None)
            raise

    def step_done(self, step: StepEvents) -> None:
        """The engine's message after a step."""
        before, now = self._stats, step.stats
        self._stats = now
        if now.num_step_tokens != before.num_step_tokens:
            self.iteration_tokens.observe(now.num_step_tokens - before.num_step_tokens)
        if now.num_preemptions != before.num_preemptions:
            self.num_preemptions.inc(now.num_preemptions - before.num_preemptions)
        if now.prefix_cache_queries != before.prefix_cache_queries:
            self.prefix_cache_queries.inc(now.prefix_cache_queries - before.prefix_cache_queries)
        if now.prefix_cache_hits != before.prefix_cache_hits:
            self.prefix_cache_hits.inc(now.prefix_cache_hits - before.prefix_cache_hits)
        self._take_in(step.events)

    def engine_lost(self) -> None:
        """The engine has died, and with it all that it hadn't ended. Another counts from 0."""
        self._stats = EngineStats.of_nothing()
        lost, self._sequences = self._sequences, {}
        for sequence in lost.values():
            self._end(sequence, FinishReason.STOP if sequence.has_stop_string else FinishReason.ERROR, None)

    def engine_restarted(self) -> None:
        """Another engine serves."""
        self.engine_restarts.inc()

    def request_done(self, record: RequestRecord) -> None:
        """An HTTP request's answer is over."""
        self.http_requests.inc(1, record.route, str(record.status))
        if record.error is not None:
            self.http_errors.inc(1, record.error)
        if record.outputs:
            self.request_params_n.observe(record.num_samples)
            longest = max(len(output.token_ids) for output in record.outputs.values())
            self.request_max_num_generation_tokens.observe(longest)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """All of it in the format that a client with this ``Accept`` header wants, and the format's name."""
        if "application/openmetrics-text" not in accept:
            return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4
        # Not prometheus-client's choose_encoder: where a client leaves open how names are to be escaped, it
        # writes the colon of our names as an underscore, in the samples alone (its issue 1177).
        content: bytes = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
            self._registry, escaping=openmetrics.ALLOWUTF8
        )
        return content, openmetrics.CONTENT_TYPE_LATEST

    def collect(self) -> Iterable[Metric]:
        """prometheus-client's hook: all samples, as they are now."""
        stats, is_alive = self._stats, self._is_alive()
        self.engine_up.set(float(is_alive))
        self.num_requests_running.set(stats.num_running if is_alive else 0)
        self.num_requests_waiting.set(stats.num_waiting if is_alive else 0)
        self.kv_cache_usage_perc.set(stats.kv_cache_usage if is_alive else 0)
        waiting = {COMPILING: stats.num_compiling}
        if stats.waits_for is not None:
            waiting[stats.waits_for] = stats.num_waiting - stats.num_compiling
        for reason in WAITS_FOR:
            self.num_requests_waiting_by_reason.set(waiting.get(reason, 0) if is_alive else 0, reason)
        return [instrument.family(self._prefix, self._labels) for instrument in self.instruments]

    def describe(self) -> Iterable[Metric]:
        """prometheus-client's hook: no names that it would have to keep apart from another collector's."""
        return []

    def _take_in(self, events: list[EngineEvent]) -> None:
        now = self._clock()
        # Nearly all sequences of a step were in the step before: one observation serves them all.
        sequences_since: dict[float, int] = {}
        num_tokens = 0
        for event in events:
            sequence = self._sequences.get(event.request_id)
            if sequence is None:
                continue
            if event.new_token_ids:
                last = sequence.last_token_at
                if last:
                    sequences_since[last] = sequences_since.get(last, 0) + 1
                else:
                    self._begin(sequence, event, now)
                sequence.last_token_at = now
                sequence.num_tokens += len(event.new_token_ids)
                num_tokens += len(event.new_token_ids)
            if event.finish_reason is not None:
                del self._sequences[event.request_id]
                is_stop = sequence.has_stop_string and event.finish_reason is FinishReason.ABORT
                self._end(sequence, FinishReason.STOP if is_stop else event.finish_reason, event)
        if num_tokens:
            self.generation_tokens.inc(num_tokens)
        for last, count in sequences_since.items():
            self.inter_token_latency.observe(now - last, count)

    def _begin(self, sequence: Sequence, event: EngineEvent, now: float) -> None:
        self.time_to_first_token.observe(now - sequence.received_at)
        self.prompt_tokens.inc(sequence.num_prompt_tokens)
        if event.metrics is not None:
            self.prompt_tokens_cached.inc(event.metrics.num_cached_tokens)

    def _end(self, sequence: Sequence, reason: FinishReason, event: EngineEvent | None) -> None:
        """Count a sequence that has ended; ``event`` is the engine's last one, if the engine is there."""
        self.request_success.inc(1, reason.value)
        self.e2e_latency.observe(self._clock() - sequence.received_at)
        self.request_prompt_tokens.observe(sequence.num_prompt_tokens)
        self.request_generation_tokens.observe(sequence.num_tokens)
        if sequence.max_tokens is not None:
            self.request_params_max_tokens.observe(sequence.max_tokens)
        times = None if event is None else event.metrics
        if times is None:
            return
        self.queue_time.observe((times.first_scheduled_time or times.finished_time) - times.arrival_time)
        if times.first_token_time:
            decode = times.finished_time - times.first_token_time
            self.prefill_time.observe(times.first_token_time - times.first_scheduled_time)
            self.decode_time.observe(decode)
            self.inference_time.observe(times.finished_time - times.first_scheduled_time)
            self.request_prefill_kv_computed_tokens.observe(
                sequence.num_prompt_tokens - times.num_cached_tokens
            )
            if sequence.num_tokens > 1:
                self.time_per_output_token.observe(decode / (sequence.num_tokens - 1))


def _cache_labels(config: EngineConfig, stats: EngineStats) -> dict[str, str]:
    return {
        "block_size": str(BLOCK_SIZE),
        "cache_dtype": config.kv_cache_dtype,
        "enable_prefix_caching": str(config.use_prefix_cache),
        "gpu_memory_utilization": str(config.gpu_memory_utilization),
        "kv_allocation": config.kv_allocation,
        "num_gpu_blocks": str(stats.num_blocks),
    }
