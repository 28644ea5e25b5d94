"""Overload: four times as many requests as the server can answer. Who gets in is served as well as ever.

The limit is set as docs/endurance.md says that an operator may set it: :func:`most_waiting`.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter

from minivllm_bench.metrics import percentile
from tests.endurance.client import Answer, post, until_idle
from tests.endurance.findings import Findings
from tests.endurance.processes import Endured, endured_server

OVERLOAD = 4.0
KNEE = 0.8
"""Of the most that it can answer: beyond, waiting times grow without end."""
MOST_TTFT = 2.0
"""Times that at the knee, for those who are let in."""
MOST_REFUSAL_SECONDS = 0.05
_DEVIATIONS = 2.33
"""As many above its mean is the 99th percentile of a normal distribution."""
_NUM_SEQS = 8
# Large enough that the engine is what there is too little of, not the server before it.
_HIDDEN_SIZE, _NUM_LAYERS = 256, 8
_FLAGS = ("--max-num-seqs", str(_NUM_SEQS), "--max-model-len", "512", "--kv-cache-memory", "64MB")


def most_waiting(rate: float, seconds: float) -> int:
    """So many may wait where ``rate`` requests a second end and 99 of 100 are to wait ``seconds`` at most.

    The last of n waits for n others to end: n / rate on average, with a deviation of about sqrt(n) / rate.
    """
    root = math.sqrt(_DEVIATIONS**2 / 4 + rate * seconds) - _DEVIATIONS / 2
    return max(math.floor(root**2), 1)


class _Load:
    def __init__(self, endured: Endured, seed: str) -> None:
        self._port = endured.port
        self._rng = random.Random(seed)

    async def ask(self) -> Answer:
        body = {
            "prompt": [self._rng.randrange(3, 300) for _ in range(self._rng.randrange(32, 96))],
            "max_tokens": self._rng.randrange(32, 96),
            "ignore_eos": True,
            "stream": True,
        }
        return await post(self._port, body)

    async def closed(self, users: int, seconds: float) -> float:
        """Requests that so many users get answered in a second; one that goes on after it counts in part."""
        start, answers = time.monotonic(), list[Answer]()
        end = start + seconds

        async def user() -> None:
            while time.monotonic() < end:
                answers.append(await self.ask())

        await asyncio.gather(*(user() for _ in range(users)))
        return sum(min((end - a.sent) / (a.finished - a.sent), 1.0) for a in answers) / seconds

    async def open(self, rate: float, seconds: float) -> list[Answer]:
        """All that came of so many requests a second, whether or not the server keeps up."""
        start, arrival, tasks = time.monotonic(), 0.0, list[asyncio.Task[Answer]]()
        while (arrival := arrival + self._rng.expovariate(rate)) < seconds:
            await asyncio.sleep(start + arrival - time.monotonic())
            tasks.append(asyncio.create_task(self.ask()))
        answers = await asyncio.gather(*tasks)
        await until_idle(self._port)
        return answers


def _ttfts(answers: list[Answer]) -> list[float]:
    return [
        answer.first_text - answer.sent
        for answer in answers
        if answer.first_text is not None and answer.is_complete
    ]


async def _measure(
    endured: Endured, seed: int, seconds: float, findings: Findings
) -> tuple[float, float, float]:
    """The sustainable rate, and the median and the 99th percentile of the TTFT at the knee."""
    load = _Load(endured, f"{seed}/measure")
    await load.closed(2 * _NUM_SEQS, seconds / 4)
    rate = await load.closed(2 * _NUM_SEQS, seconds)
    answers = await load.open(KNEE * rate, seconds)
    ttfts = _ttfts(answers)
    findings.promise(
        "all are answered at the knee",
        all(answer.is_complete for answer in answers),
        f"{len(answers)} requests",
    )
    return rate, percentile(ttfts, 50), percentile(ttfts, 99)


async def _overload(
    endured: Endured, seed: int, seconds: float, rate: float, knee_ttft: float, findings: Findings
) -> None:
    load = _Load(endured, f"{seed}/overload")
    await load.closed(_NUM_SEQS, seconds / 4)
    answers = await load.open(OVERLOAD * rate, seconds)
    outcomes = Counter(answer.outcome for answer in answers)
    refusals = [answer for answer in answers if answer.status == 503]
    refusal_seconds = [answer.finished - answer.sent for answer in refusals]
    ttft = percentile(_ttfts(answers), 99)
    findings.figures |= {
        "requests": len(answers),
        "outcomes": dict(outcomes),
        "p99 ttft at 4 times the rate, s": round(ttft, 3),
        "p50, p99 and longest time of a refusal, s": [
            round(percentile(refusal_seconds, percent), 4) for percent in (50, 99, 100)
        ],
    }
    findings.promise(
        "every request is answered or refused",
        set(outcomes) <= {"complete", "503 overloaded"} and outcomes["complete"] > 0,
        dict(outcomes),
    )
    findings.promise(
        "some are refused", bool(refusals), f"{len(refusals)} of {len(answers)}", takes_quiet=True
    )
    findings.promise(
        "every refusal says when to try again",
        all(answer.retry_after is not None for answer in refusals),
        Counter(answer.retry_after for answer in refusals),
    )
    findings.promise(
        f"the p99 TTFT of those let in is at most {MOST_TTFT:g} times that at the knee",
        ttft <= MOST_TTFT * knee_ttft,
        f"{ttft:.3f} s and {knee_ttft:.3f} s",
        takes_quiet=True,
    )
    findings.promise(
        f"99 of 100 refusals take at most {MOST_REFUSAL_SECONDS:g} s",
        percentile(refusal_seconds, 99) <= MOST_REFUSAL_SECONDS,
        f"{percentile(refusal_seconds, 99):.4f} s",
        takes_quiet=True,
    )


def run(*, seed: int, quick: bool) -> Findings:
    """Phases of 30 s; quick: of 2 s, with a tiny model."""
    findings = Findings()
    seconds = 2.0 if quick else 30.0
    sizes = {} if quick else {"hidden_size": _HIDDEN_SIZE, "num_layers": _NUM_LAYERS}
    with endured_server(*_FLAGS, **sizes) as endured:
        rate, usual, ttft = asyncio.run(_measure(endured, seed, seconds, findings))
    # Refusing takes its share of the machine, too: the knee's rate. The rest of a TTFT isn't waiting.
    limit = most_waiting(KNEE * rate, MOST_TTFT * ttft - usual)
    findings.figures = {
        "sustainable rate, requests/s": round(rate, 2),
        "p50 ttft at the knee, s": round(usual, 3),
        "p99 ttft at the knee, s": round(ttft, 3),
        "--max-waiting-requests": limit,
    }
    with endured_server(*_FLAGS, "--max-waiting-requests", str(limit), **sizes) as endured:
        asyncio.run(_overload(endured, seed, seconds, rate, ttft, findings))
    return findings
