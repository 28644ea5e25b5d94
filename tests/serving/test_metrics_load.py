"""``/metrics`` of a real server under load: every metric moves, and what it says agrees with the answers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.conftest import Server, serving
from tests.tiny_model import write_tiny_model

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
CONSTANT = {"minivllm:cache_config_info"}
FLEETING = {
    f"minivllm:{name}"
    for name in ("num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc")
}


class Scrapes:
    """All values that a server's series had, as Prometheus would see them, only more often."""

    def __init__(self, server: Server) -> None:
        self.client = httpx.Client(base_url=server.url, timeout=60)
        self.first = self.last = self.read()
        self.moved: set[str] = set()

    def read(self) -> Series:
        self.text = self.client.get("/metrics").text
        self.families = {metric.name for metric in text_string_to_metric_families(self.text)}
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for metric in text_string_to_metric_families(self.text)
            for sample in metric.samples
        }

    def take(self) -> None:
        self.last = self.read()
        self.moved |= {
            name for (name, labels), value in self.last.items() if self.first.get((name, labels), 0) != value
        }

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(600):
            self.take()
            if condition():
                return
            time.sleep(0.05)
        pytest.fail("waited 30 s in vain")

    def value(self, name: str, **labels: str) -> float:
        """Of all series of that name and with these labels, together."""
        wanted = labels.items()
        return sum(
            value
            for (found, own), value in self.last.items()
            if found == f"minivllm:{name}" and wanted <= dict(own).items()
        )

    def still(self) -> set[str]:
        """Families of which nothing moved."""
        names = {name for name in self.families if name.startswith("minivllm:")}
        return {name for name in names if not any(moved.startswith(name) for moved in self.moved)}


def test_every_metric_moves_and_agrees_with_the_answers(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    flags = (
        "--model", write_tiny_model(tmp_path), "--load-format", "dummy", "--kv-cache-memory", "64KB",
        "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--request-log", str(log),
    )  # fmt: skip
    with serving(*flags) as server:
        scrapes = Scrapes(server)

        def ask(number: int) -> tuple[int, int]:
            """Prompt and answer tokens. The prompts begin alike; four sequences don't fit into the blocks."""
            body = {"prompt": [7] * 64 + [number], "n": 1 + number % 2, "max_tokens": 60, "ignore_eos": True}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
            usage = answer["usage"]
            return usage["prompt_tokens"] * len(answer["choices"]), usage["completion_tokens"]

        def ask_all() -> list[tuple[int, int]]:
            with ThreadPoolExecutor(12) as pool:
                answers = [pool.submit(ask, number) for number in range(12)]
                scrapes.until(lambda: all(answer.done() for answer in answers))
            scrapes.take()
            return [answer.result() for answer in answers]

        prompts, generated = map(sum, zip(*ask_all(), strict=True))
        assert scrapes.value("request_success_total", finished_reason="length") == 18
        assert scrapes.value("prompt_tokens_total") == prompts == 18 * 65
        assert scrapes.value("generation_tokens_total") == generated == 18 * 60
        assert scrapes.value("request_generation_tokens_sum") == generated
        assert scrapes.value("inter_token_latency_seconds_count") == generated - 18
        assert scrapes.value("num_preemptions_total") > 0
        # All that went through the model: what wasn't cached, and some of it again after preemptions.
        cached = scrapes.value("prompt_tokens_cached_total")
        assert 0 < cached < prompts
        assert scrapes.value("iteration_tokens_total_sum") > prompts - cached + generated - 18
        assert scrapes.value("num_requests_waiting") == scrapes.value("num_requests_running") == 0
        assert scrapes.value("num_requests_waiting_by_reason") == 0
        for phase in ("queue", "prefill", "decode", "inference"):
            assert scrapes.value(f"request_{phase}_time_seconds_count") == 18
        assert scrapes.value("request_inference_time_seconds_sum") == pytest.approx(
            scrapes.value("request_prefill_time_seconds_sum")
            + scrapes.value("request_decode_time_seconds_sum")
        )

        num_asked = 12
        while not scrapes.moved >= FLEETING and num_asked < 120:  # this test slept while they were up
            ask_all()
            num_asked += 12

        body = {"prompt": [5], "max_tokens": 150, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
        scrapes.until(lambda: scrapes.value("request_success_total", finished_reason="abort") == 1)

        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        if not children.exists():
            pytest.skip("finds the engine process in /proc")
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        scrapes.until(lambda: scrapes.value("engine_up") == 0)
        refused = httpx.post(f"{server.url}/v1/completions", json=body)
        assert refused.json()["error"]["code"] == "engine_restarting"
        scrapes.until(lambda: scrapes.value("engine_restarts_total") == 1)
        assert scrapes.still() == CONSTANT
        assert len(log.read_text().splitlines()) == num_asked + 2
        check_with_promtool(scrapes.text)


def check_with_promtool(text: str) -> None:
    """Prometheus's own opinion, where it is installed."""
    promtool = shutil.which("promtool")
    if promtool is None:
        return
    check = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    problems = check.stdout + check.stderr
    assert check.returncode in (0, 3), problems  # 3: it reads it, and doesn't like the style
    # vLLM's names are what they are.
    known = ("metric names should not contain ':'", 'non-counter metrics should not have "_total" suffix')
    assert not [line for line in problems.splitlines() if not line.endswith(known)]
