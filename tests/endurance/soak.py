"""Soak: thousands of requests of all kinds, many of whose clients leave, in every mode of the engine."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from tests.endurance.client import COMPLETIONS, Answer, post, request_head, send, until_idle
from tests.endurance.findings import Findings
from tests.endurance.processes import Endured, endured_server, resident_bytes

SHARE_ABORTED, SHARE_MALFORMED, SHARE_REPEATED = 0.30, 0.05, 0.01
MAX_MODEL_LEN = 512
VOCAB_SIZE = 300
# About 97 blocks: three sequences of the greatest length, for 128 clients at once.
FLAGS = ("--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory", "400kB")
_SAMPLE_SECONDS = 0.5
_SHARED_PREFIX = [7 + i % 90 for i in range(96)]


@dataclass
class Plan:
    """One request, and what must come of it."""

    kind: str
    """``whole`` (answered to its end), ``aborted``, ``malformed``, or ``repeated``: asked again in quiet."""
    body: dict[str, Any] = field(default_factory=dict)
    raw: bytes = b""
    leave_after: float | None = None
    resets: bool = False
    outcomes: tuple[str, ...] = ("complete",)


def plan(seed: str, number: int) -> Plan:
    """The same for the same seed and number."""
    rng = random.Random(f"{seed}/{number}")
    draw = rng.random()
    if draw < SHARE_MALFORMED:
        return _malformed(rng)
    length = min(int(rng.lognormvariate(3.5, 1.0)) + 1, MAX_MODEL_LEN - 80)
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
    if rng.random() < 0.25:
        prompt = (_SHARED_PREFIX + prompt)[: MAX_MODEL_LEN - 80]
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": min(int(rng.lognormvariate(2.5, 0.8)) + 1, 64),
        "temperature": rng.choice([0, 0.7, 1]),
        "seed": rng.randrange(2**31),
        "ignore_eos": rng.random() < 0.8,
        "stream": rng.random() < 0.5,
    }
    if rng.random() < 0.1:
        body |= {"top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    if rng.random() < 0.05:
        body["n"] = 2
    if draw < SHARE_MALFORMED + SHARE_ABORTED:
        leave_after = rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, 1), rng.uniform(0, 4)])
        content = json.dumps(body).encode()
        raw = request_head(COMPLETIONS, len(content)) + content
        outcomes = ("left", "complete")  # some are faster than their client
        return Plan("aborted", body, raw, leave_after, rng.random() < 0.3, outcomes)
    if draw < SHARE_MALFORMED + SHARE_ABORTED + SHARE_REPEATED:
        # Log probabilities tell tokens apart whose text is the same.
        return Plan("repeated", {**body, "n": 1, "stream": False, "logprobs": 0})
    return Plan("whole", body)


def _malformed(rng: random.Random) -> Plan:
    refused = ("400 invalid_request_error",)
    bad_bodies = [
        b'{"prompt": "x", ',
        b'{"prompt": "x", "temperature": -1}',
        b'{"prompt": [1, 2, 99999]}',
        b'{"prompt": "x", "max_tokens": 0}',
        b'{"prompt": "x", "unheard_of": 1}',
        b'{"prompt": {"a": [1]}}',
        b'["prompt"]',
        b"\xff\xfe\x00",
        b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        json.dumps({"prompt": [5] * 20_000}).encode(),
    ]
    choice = rng.randrange(len(bad_bodies) + 3)
    if choice < len(bad_bodies):
        content = bad_bodies[choice]
        raw = request_head(COMPLETIONS, len(content)) + content
        return Plan("malformed", raw=raw, outcomes=(*refused, "400 context_length_exceeded"))
    if choice == len(bad_bodies):
        return Plan("malformed", raw=b"GOT / HTTP/9\r\n\r\n", outcomes=refused)
    if choice == len(bad_bodies) + 1:  # less of a body than was announced
        raw = request_head(COMPLETIONS, 1000) + b'{"prompt": "x"'
        return Plan("malformed", raw=raw, leave_after=rng.uniform(0, 0.5), outcomes=("left",))
    raw = b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
    return Plan("malformed", raw=raw, outcomes=("404 invalid_request_error",))


@dataclass
class _Memory:
    """Resident memory over time, of both processes."""

    samples: list[tuple[int, int]] = field(default_factory=list)

    async def watch(self, endured: Endured) -> None:
        engine = endured.engine_pid() or 0
        while True:
            self.samples.append((resident_bytes(endured.pid), resident_bytes(engine)))
            await asyncio.sleep(_SAMPLE_SECONDS)

    def over_time(self, process: int) -> list[float]:
        """MiB: medians of eight parts of the run."""
        values = [sample[process] for sample in self.samples]
        size = max(len(values) // 8, 1)
        parts = [values[start : start + size] for start in range(0, len(values), size)]
        return [round(statistics.median(part) / 2**20, 2) for part in parts]

    def growth(self, process: int) -> float:
        """From the median of the first quarter to that of the last, as a share."""
        values = [sample[process] for sample in self.samples]
        quarter = max(len(values) // 4, 1)
        return statistics.median(values[-quarter:]) / statistics.median(values[:quarter]) - 1


async def _ask(port: int, planned: Plan) -> Answer:
    if planned.raw:
        return await send(port, planned.raw, leave_after=planned.leave_after, resets=planned.resets)
    return await post(port, planned.body)


def _words(answer: Answer) -> tuple[str, list[float]]:
    choice = answer.json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def _is_same(one: tuple[str, list[float]], other: tuple[str, list[float]]) -> bool:
    """Texts to the character; log probabilities beyond what the order of a sum changes."""
    pairs = zip(one[1], other[1], strict=False)
    return (
        one[0] == other[0]
        and len(one[1]) == len(other[1])
        and all(math.isclose(a, b, abs_tol=1e-3) for a, b in pairs)
    )


async def _soak(
    endured: Endured, name: str, findings: Findings, *, seed: str, num: int, at_once: int
) -> None:
    port = endured.port
    await _send_all(port, f"{seed}/warm-up", min(num, 1000), at_once)  # pools of threads, caches, allocators
    await until_idle(port)
    before = await endured.counts_at_rest()
    blocks_before = endured.num_memory_blocks
    memory = _Memory()
    watching = asyncio.create_task(memory.watch(endured))
    start = time.monotonic()
    results = await _send_all(port, seed, num, at_once)
    seconds = time.monotonic() - start
    watching.cancel()
    health = await until_idle(port)
    after = await endured.counts_settled(before)
    more_objects = endured.num_memory_blocks / blocks_before - 1

    outcomes = Counter(f"{planned.kind}: {answer.outcome}" for planned, answer in results)
    unforeseen = [
        f"{planned.kind} request: {answer.outcome}"
        for planned, answer in results
        if answer.outcome not in planned.outcomes
    ]
    repeated = [(planned, answer) for planned, answer in results if planned.kind == "repeated"]
    different = 0
    for planned, answer in repeated:
        quiet = await post(port, planned.body)
        different += not (answer.is_complete and _is_same(_words(answer), _words(quiet)))
    growths = {"server": memory.growth(0), "engine": memory.growth(1)}
    findings.figures[name] = {
        "requests": len(results),
        "at once": at_once,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "asked again in quiet": len(repeated),
        "memory growth": {process: round(growth, 4) for process, growth in growths.items()},
        "memory over time, MiB": {"server": memory.over_time(0), "engine": memory.over_time(1)},
        "growth of the server's Python objects": round(more_objects, 4),
        "held before": before,
        "held after": after,
    }
    findings.promise(
        f"{name}: every request is accounted for",
        len(results) == num and not unforeseen,
        f"{len(results)} of {num}, {len(unforeseen)} unforeseen {Counter(unforeseen).most_common(3)}",
    )
    findings.promise(
        f"{name}: no block is left in use", health["kv_cache_usage"] == 0.0, health["kv_cache_usage"]
    )
    findings.promise(
        f"{name}: no task, thread or file is left", before == after, f"{before} before, {after} after"
    )
    findings.promise(
        f"{name}: the server has less than 1% more Python objects",
        more_objects < 0.01,
        f"{more_objects:+.2%}",
    )
    findings.promise(
        f"{name}: the same tokens in quiet", different == 0, f"{different} of {len(repeated)} differ"
    )
    for process, growth in growths.items():
        findings.promise(
            f"{name}: the {process}'s memory grows by less than 2%",
            growth < 0.02,
            f"{growth:+.2%}",
            takes_quiet=True,
        )


async def _send_all(port: int, seed: str, num: int, at_once: int) -> list[tuple[Plan, Answer]]:
    numbers: Iterator[int] = iter(range(num))
    results: list[tuple[Plan, Answer]] = []

    async def client() -> None:
        for number in numbers:
            planned = plan(seed, number)
            results.append((planned, await _ask(port, planned)))

    await asyncio.gather(*(client() for _ in range(at_once)))
    return results


def run(*, seed: int, quick: bool) -> Findings:
    """All modes, one after the other: 20,000 requests together; quick: the first and the last, and 300."""
    findings = Findings()
    modes = list(product(("paged", "contiguous"), ("continuous", "sequential")))
    num, at_once = (150, 32) if quick else (5000, 128)
    for kv_allocation, scheduler in (modes[0], modes[-1]) if quick else modes:
        flags = (*FLAGS, "--kv-allocation", kv_allocation, "--scheduler", scheduler)
        name = f"{kv_allocation}, {scheduler}"
        with endured_server(*flags) as endured:
            asyncio.run(_soak(endured, name, findings, seed=f"{seed}/{name}", num=num, at_once=at_once))
            code = endured.server.stop()
            findings.promise(f"{name}: it stops when told to", code == 0, f"code {code}")
            left = endured.sockets_left()
            findings.promise(f"{name}: no socket is left", not left, left)
    return findings
