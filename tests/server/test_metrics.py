"""``/metrics``: names and types that vLLM's users know, and numbers that a naive count arrives at, too."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator

import httpx
import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from minivllm.config import ServerConfig
from minivllm.engine.messages import StepEvents
from minivllm.errors import ConfigError, EngineDeadError
from minivllm.request import EngineEvent, EngineInfo, EngineStats, FinishReason, RequestMetrics
from minivllm.server.instruments import Counter, Histogram
from minivllm.server.keys import ApiKeys
from minivllm.server.metrics import WAITS_FOR, ServerMetrics, length_bounds

from .fakes import MODEL, RunningServer, served

REQUEST_SECONDS = [
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680
]  # fmt: skip
NEXT_TOKEN_SECONDS = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80
]  # fmt: skip
FIRST_TOKEN_SECONDS = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560
]  # fmt: skip
LENGTHS = [1, 2, 5, 10, 20, 50, 100, 200]  # up to a context of 256
VLLM: dict[str, tuple[str, list[str], list[float]]] = {
    "num_requests_running": ("gauge", [], []),
    "num_requests_waiting": ("gauge", [], []),
    "num_requests_waiting_by_reason": ("gauge", ["reason"], []),
    "kv_cache_usage_perc": ("gauge", [], []),
    "prefix_cache_queries": ("counter", [], []),
    "prefix_cache_hits": ("counter", [], []),
    "num_preemptions": ("counter", [], []),
    "prompt_tokens": ("counter", [], []),
    "prompt_tokens_cached": ("counter", [], []),
    "generation_tokens": ("counter", [], []),
    "request_success": ("counter", ["finished_reason"], []),
    "iteration_tokens_total": (
        "histogram", [], [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    ),
    "time_to_first_token_seconds": ("histogram", [], FIRST_TOKEN_SECONDS),
    "inter_token_latency_seconds": ("histogram", [], NEXT_TOKEN_SECONDS),
    "request_time_per_output_token_seconds": ("histogram", [], NEXT_TOKEN_SECONDS),
    "e2e_request_latency_seconds": ("histogram", [], REQUEST_SECONDS),
    "request_queue_time_seconds": ("histogram", [], REQUEST_SECONDS),
    "request_inference_time_seconds": ("histogram", [], REQUEST_SECONDS),
    "request_prefill_time_seconds": ("histogram", [], REQUEST_SECONDS),
    "request_decode_time_seconds": ("histogram", [], REQUEST_SECONDS),
    "request_prompt_tokens": ("histogram", [], LENGTHS),
    "request_prefill_kv_computed_tokens": ("histogram", [], LENGTHS),
    "request_generation_tokens": ("histogram", [], LENGTHS),
    "request_max_num_generation_tokens": ("histogram", [], LENGTHS),
    "request_params_n": ("histogram", [], [1, 2, 5, 10, 20]),
    "request_params_max_tokens": ("histogram", [], LENGTHS),
}  # fmt: skip
"""vLLM's, from vllm/v1/metrics/loggers.py: type, labels besides model_name and engine, bucket bounds."""
OWN = {
    "engine_up": "gauge",
    "engine_restarts": "counter",
    "http_requests": "counter",
    "http_errors": "counter",
}
CACHE_LABELS = {
    "block_size",
    "cache_dtype",
    "enable_prefix_caching",
    "gpu_memory_utilization",
    "num_gpu_blocks",
}
"""Those of vLLM's cache_config_info that mean something here."""


def families(text: str) -> dict[str, Metric]:
    """By name without the prefix, those of the process left out."""
    return {
        metric.name.partition(":")[2]: metric
        for metric in parse_text(text)
        if not metric.name.startswith("process")
    }


class TestNames:
    def test_they_are_vllm_s(self, server: RunningServer) -> None:
        found = families(server.http.get("/metrics").text)
        assert found.keys() == {*VLLM, *OWN, "cache_config_info"}
        for name, (kind, labels, bounds) in VLLM.items():
            metric = found[name]
            assert metric.type == kind, name
            for sample in metric.samples:
                assert sample.labels.keys() - {"le"} == {"model_name", "engine", *labels}
                assert (sample.labels["model_name"], sample.labels["engine"]) == (MODEL, "0")
            own_bounds = [float(s.labels["le"]) for s in metric.samples if s.name.endswith("_bucket")]
            # Ours may be finer, above all at the low end; none of theirs is missing.
            assert own_bounds == sorted(own_bounds)
            assert {*bounds} <= {*own_bounds}
            assert (float("inf") in own_bounds) == bool(bounds)
        for name, kind in OWN.items():
            assert found[name].type == kind
        (info,) = found["cache_config_info"].samples
        assert info.labels.keys() >= CACHE_LABELS
        assert (info.value, info.labels["num_gpu_blocks"], info.labels["block_size"]) == (1, "12", "16")

    @pytest.mark.parametrize("prefix", ["vllm", "my_llm"])
    def test_the_prefix_is_a_flag(self, prefix: str) -> None:
        with served(ServerConfig(metrics_prefix=prefix)) as port:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        names = {metric.name for metric in parse_text(text)}
        assert {name for name in names if not name.startswith("process_")} == {
            f"{prefix}:{name}" for name in (*VLLM, *OWN, "cache_config_info")
        }

    @pytest.mark.parametrize("prefix", ["", "a:b", "a-b", "1a", "ä"])
    def test_a_prefix_that_prometheus_would_refuse(self, prefix: str) -> None:
        with pytest.raises(ConfigError, match="--metrics-prefix"):
            ServerConfig(metrics_prefix=prefix)


class TestFormats:
    @pytest.mark.parametrize(
        "accept",
        [
            # Prometheus 2 and 3
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
            "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
            "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.2",
        ],
    )
    def test_openmetrics_for_those_who_ask(self, server: RunningServer, accept: str) -> None:
        plain = server.http.get("/metrics")
        assert plain.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        other = server.http.get("/metrics", headers={"Accept": accept})
        assert other.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert other.text.endswith("# EOF\n")
        kinds = {metric.name: metric.type for metric in parse_openmetrics(other.text)}
        assert kinds == {metric.name: metric.type for metric in parse_text(plain.text)}

    def test_model_names_are_escaped(self) -> None:
        name = 'a"b\\c\nd'
        metrics = ServerMetrics("minivllm", name, INFO, stats())
        samples = [
            sample
            for metric in parse_text(metrics.expose("")[0].decode())
            for sample in metric.samples
            if "model_name" in sample.labels
        ]
        assert samples
        assert {sample.labels["model_name"] for sample in samples} == {name}

    def test_it_needs_a_key_where_others_do(self) -> None:
        with served(ServerConfig(), ApiKeys(["secret"])) as port:
            url = f"http://127.0.0.1:{port}/metrics"
            assert httpx.get(url).status_code == 401
            assert httpx.get(url, headers={"Authorization": "Bearer secret"}).status_code == 200


class TestInstruments:
    @given(
        st.lists(st.tuples(st.floats(-10, 10) | st.sampled_from([0.1, 0.5, 2.5]), st.integers(1, 4))),
        st.sets(st.sampled_from([0.1, 0.5, 1.0, 2.5, 100000.0, 2e6]), min_size=1).map(sorted),
    )
    def test_histograms_are_prometheus_client_s(
        self, observations: list[tuple[float, int]], bounds: list[float]
    ) -> None:
        own = Histogram("name", "Help.", bounds)
        theirs = prometheus_client.Histogram("name", "Help.", buckets=bounds, registry=None)
        for value, count in observations:
            own.observe(value, count)
            for _ in range(count):
                theirs.observe(value)
        (expected,) = theirs.collect()
        wanted = {
            (sample.name, sample.labels.get("le")): sample.value
            for sample in expected.samples
            if not sample.name.endswith("_created")
        }
        found = {
            (sample.name[2:], sample.labels.get("le")): sample.value for sample in own.family("p", {}).samples
        }
        assert found == pytest.approx(wanted)

    def test_known_series_are_there_from_the_start(self) -> None:
        counter = Counter("name", "Help.", labels=("why",), known=[("a",), ("b",)])
        counter.inc(2, "b")
        counter.inc(1, "c")
        samples = counter.family("p", {"x": "y"}).samples
        assert [(s.name, s.labels, s.value) for s in samples] == [
            ("p:name_total", {"x": "y", "why": why}, value) for why, value in (("a", 0), ("b", 2), ("c", 1))
        ]

    @pytest.mark.parametrize(("longest", "last"), [(1, 1), (9, 5), (10, 10), (256, 200), (131072, 100000)])
    def test_lengths(self, longest: int, last: int) -> None:
        bounds = length_bounds(longest)
        assert bounds[-1] == last
        assert all(str(bound).rstrip("0") in {"1", "2", "5"} for bound in bounds)
        assert (
            len(bounds)
            == len({*bounds})
            == 3 * (len(str(longest)) - 1)
            + sum(int(digit) * 10 ** (len(str(longest)) - 1) <= longest for digit in "125")
        )


INFO = EngineInfo(max_model_len=256, vocab_size=300)


def stats(
    *,
    running: int = 0,
    waiting: int = 0,
    tokens: int = 0,
    preemptions: int = 0,
    queries: int = 0,
    hits: int = 0,
    compiling: int = 0,
    waits_for: str | None = None,
) -> EngineStats:
    return EngineStats(running, waiting, 3, 12, preemptions, queries, hits, tokens, compiling, waits_for)


class Watched:
    """Metrics that nobody but the test tells anything, with a clock of the test's own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.is_alive = True
        self.metrics = ServerMetrics(
            "minivllm", "m", INFO, stats(), is_alive=lambda: self.is_alive, clock=lambda: self.now
        )

    def step(self, *events: EngineEvent, **counts: int | str | None) -> None:
        self.metrics.step_done(StepEvents([*events], stats(**counts)))  # type: ignore[arg-type]

    def value(self, name: str, **labels: str) -> float:
        """Of the one series with this name, as it is written, and these labels."""
        (found,) = [
            sample.value
            for metric in parse_text(self.metrics.expose("")[0].decode())
            for sample in metric.samples
            if sample.name == f"minivllm:{name}" and labels.items() <= sample.labels.items()
        ]
        return found

    def ended(self) -> dict[str, float]:
        return {
            reason.value: count
            for reason in FinishReason
            if (count := self.value("request_success_total", finished_reason=reason.value))
        }


@pytest.fixture
def watched() -> Watched:
    return Watched()


class TestSteps:
    def test_gauges_are_the_last_step_s(self, watched: Watched) -> None:
        watched.step(running=4, waiting=7, compiling=2, waits_for="blocks")
        assert watched.value("num_requests_running") == 4
        assert watched.value("num_requests_waiting") == 7
        assert watched.value("kv_cache_usage_perc") == 0.25
        by_reason = {
            reason: watched.value("num_requests_waiting_by_reason", reason=reason) for reason in WAITS_FOR
        }
        assert {reason: count for reason, count in by_reason.items() if count} == {"blocks": 5, "grammar": 2}
        watched.step()
        assert watched.value("num_requests_waiting_by_reason", reason="blocks") == 0

    def test_a_dead_engine_runs_nothing(self, watched: Watched) -> None:
        watched.step(running=4, waiting=7, waits_for="max_num_seqs")
        assert watched.value("engine_up") == 1
        watched.is_alive = False
        for name in ("engine_up", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert watched.value(name) == 0
        watched.is_alive = True
        watched.metrics.engine_lost()  # the next one hasn't made a step yet
        assert watched.value("num_requests_running") == 0
        assert watched.value("num_requests_waiting_by_reason", reason="max_num_seqs") == 0

    def test_counts_go_on_when_the_engine_begins_anew(self, watched: Watched) -> None:
        watched.step(tokens=30, preemptions=2, queries=100, hits=32)
        watched.step(tokens=31, preemptions=2, queries=100, hits=32)
        watched.metrics.engine_lost()
        watched.metrics.engine_restarted()
        watched.step(tokens=35, preemptions=1, queries=16, hits=0)  # a new process, which counts from 0
        assert watched.value("num_preemptions_total") == 3
        assert watched.value("prefix_cache_queries_total") == 116
        assert watched.value("prefix_cache_hits_total") == 32
        assert watched.value("iteration_tokens_total_count") == 3
        assert watched.value("iteration_tokens_total_sum") == 66
        assert watched.value("engine_restarts_total") == 1
        assert watched.value("iteration_tokens_total_bucket", le="1.0") == 1

    def test_a_step_without_tokens_is_none(self, watched: Watched) -> None:
        watched.step(waiting=1)
        assert watched.value("iteration_tokens_total_count") == 0


class TestSequences:
    def test_one_life(self, watched: Watched) -> None:
        with watched.metrics.following("a", 50, 3, received_at=99.0):
            watched.now = 102.0
            first = RequestMetrics(99.5, 101.0, 101.75, 0.0, num_cached_tokens=16)
            watched.step(EngineEvent("a", [7], metrics=first))
            watched.now = 102.5
            watched.step(EngineEvent("a", [7]))
            watched.now = 104.5
            last = RequestMetrics(99.5, 101.0, 101.75, 104.0, num_cached_tokens=16)
            watched.step(EngineEvent("a", [7], finish_reason=FinishReason.LENGTH, metrics=last))
        sums = {
            "time_to_first_token_seconds": 3.0,
            "inter_token_latency_seconds": 2.5,
            "e2e_request_latency_seconds": 5.5,
            "request_queue_time_seconds": 1.5,
            "request_prefill_time_seconds": 0.75,
            "request_decode_time_seconds": 2.25,
            "request_inference_time_seconds": 3.0,
            "request_time_per_output_token_seconds": 1.125,
            "request_prompt_tokens": 50,
            "request_prefill_kv_computed_tokens": 34,
            "request_generation_tokens": 3,
            "request_params_max_tokens": 3,
        }
        assert {name: watched.value(f"{name}_sum") for name in sums} == sums
        counts = dict.fromkeys(sums, 1) | {"inter_token_latency_seconds": 2}
        assert {name: watched.value(f"{name}_count") for name in counts} == counts
        assert watched.value("prompt_tokens_total") == 50
        assert watched.value("prompt_tokens_cached_total") == 16
        assert watched.value("generation_tokens_total") == 3
        assert watched.ended() == {"length": 1}

    def test_who_is_aborted_in_the_queue_has_waited_all_that_time(self, watched: Watched) -> None:
        with watched.metrics.following("a", 50, 3, received_at=99.0):
            watched.step(waiting=1)
        assert watched.ended() == {}, "the engine hasn't ended it yet"
        times = RequestMetrics(100.0, finished_time=140.0)
        watched.step(EngineEvent("a", [], finish_reason=FinishReason.ABORT, metrics=times))
        assert watched.ended() == {"abort": 1}
        assert watched.value("request_queue_time_seconds_sum") == 40
        assert watched.value("request_prefill_time_seconds_count") == 0
        assert watched.value("prompt_tokens_total") == 0

    def test_a_stop_string_is_a_proper_end(self, watched: Watched) -> None:
        with watched.metrics.following("a", 5, 9, received_at=99.0) as sequence:
            watched.step(EngineEvent("a", [1], metrics=RequestMetrics(99.5, 99.5, 100.0)))
            sequence.has_stop_string = True
        times = RequestMetrics(99.5, 99.5, 100.0, 100.5)
        watched.step(EngineEvent("a", [], finish_reason=FinishReason.ABORT, metrics=times))
        assert watched.ended() == {"stop": 1}

    def test_nobody_is_counted_twice_and_nobody_is_lost(self, watched: Watched) -> None:
        with pytest.raises(EngineDeadError), watched.metrics.following("a", 5, 9, received_at=99.0):
            raise EngineDeadError("it is gone")
        assert watched.ended() == {"error": 1}
        watched.step(EngineEvent("a", [], finish_reason=FinishReason.ERROR))
        assert watched.ended() == {"error": 1}
        with contextlib.suppress(EngineDeadError), watched.metrics.following("b", 5, 9, received_at=99.0):
            watched.step(EngineEvent("b", [], finish_reason=FinishReason.ERROR, error="refused"))
            raise EngineDeadError("it is gone")
        assert watched.ended() == {"error": 2}
        assert watched.value("e2e_request_latency_seconds_count") == 2

    def test_those_that_a_dead_engine_leaves_behind_are_counted(self, watched: Watched) -> None:
        for name, has_stop_string in (("left", False), ("stopped", True)):
            with watched.metrics.following(name, 5, 9, received_at=99.0) as sequence:
                sequence.has_stop_string = has_stop_string
        with contextlib.suppress(EngineDeadError), watched.metrics.following("b", 5, 9, received_at=99.0):
            watched.metrics.engine_lost()
            raise EngineDeadError("it is gone")
        assert watched.ended() == {"stop": 1, "error": 2}

    @pytest.mark.parametrize("seed", range(5))
    def test_latencies_of_a_random_schedule(self, watched: Watched, seed: int) -> None:
        """Sequences come, pause and end at random; the naive way keeps a list of moments for each."""
        rng = random.Random(seed)
        moments: dict[str, list[float]] = {}
        arrivals: dict[str, float] = {}
        with contextlib.ExitStack() as all_of_them:
            for number in range(200):
                watched.now += rng.choice([0.001, 0.03, 0.7])
                if rng.random() < 0.3:
                    name = str(number)
                    arrivals[name], moments[name] = watched.now, []
                    all_of_them.enter_context(follow(watched, name))
                running = [name for name in moments if rng.random() < 0.8]
                for name in running:
                    moments[name].append(watched.now)
                watched.step(*(EngineEvent(name, [1]) for name in running))
        gaps = [b - a for times in moments.values() for a, b in itertools.pairwise(times)]
        firsts = [times[0] - arrivals[name] for name, times in moments.items() if times]
        for metric, expected in (
            ("inter_token_latency_seconds", gaps),
            ("time_to_first_token_seconds", firsts),
        ):
            assert watched.value(f"{metric}_count") == len(expected) > 20
            assert watched.value(f"{metric}_sum") == pytest.approx(sum(expected))
            for bound in (0.025, 0.5, 1.0) if metric.startswith("inter") else (0.02, 0.5, 1.0):
                at_most = sum(value <= bound for value in expected)
                assert watched.value(f"{metric}_bucket", le=str(bound)) == at_most
        assert watched.value("generation_tokens_total") == sum(map(len, moments.values()))


@contextlib.contextmanager
def follow(watched: Watched, name: str) -> Iterator[None]:
    with watched.metrics.following(name, 5, None, watched.now):
        yield


class TestHttp:
    def test_requests_by_route_and_status(self) -> None:
        with served(ServerConfig()) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            client.post("/v1/completions", json={"prompt": "a", "n": 3, "max_tokens": 4})
            client.post("/v1/completions", json={"prompt": "a", "max_tokens": 0})
            client.get(f"/v1/models/{MODEL}")
            client.get("/v1/models/other")
            for number in range(5):  # paths are the client's: they must not become series
                client.get(f"/nothing/{number}")
            found = families(client.get("/metrics").text)
        counts = {
            (sample.labels["route"], sample.labels["status"]): sample.value
            for sample in found["http_requests"].samples
        }
        assert counts == {
            ("/v1/completions", "200"): 1,
            ("/v1/completions", "400"): 1,
            ("/v1/models/{name:path}", "200"): 1,
            ("/v1/models/{name:path}", "404"): 1,
            ("unknown", "404"): 5,
        }
        errors = {sample.labels["code"]: sample.value for sample in found["http_errors"].samples}
        assert {code: count for code, count in errors.items() if count} == {
            "invalid_request_error": 6,
            "model_not_found": 1,
        }
        assert {"overloaded", "rate_limit_exceeded", "engine_restarting"} <= errors.keys()
        sums = {s.name: s.value for name in found for s in found[name].samples if s.name.endswith("_sum")}
        assert sums["minivllm:request_params_n_sum"] == 3
        assert sums["minivllm:request_max_num_generation_tokens_sum"] == 4
