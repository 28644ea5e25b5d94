"""Chaos: the engine process is killed, or stopped, at random moments under 32 clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass

from tests.endurance.client import Answer, get, post, until_idle
from tests.endurance.findings import Findings
from tests.endurance.processes import Endured, endured_server, is_running

NUM_CLIENTS = 32
STALL_TIMEOUT = 4.0
LONGEST_HANG = 2.0
"""Seconds after the engine's death within which everybody who waited for it must have an answer."""
COLD_START_FACTOR, COLD_START_ALLOWANCE = 1.5, 1.0
"""A restart may take so many times the cold start, and so many seconds more: there are clients beside it, and
the supervisor waits half a second before the second try where an engine dies before it has served anybody."""
_OUTCOMES = {"complete", "engine_dead", "500 engine_dead", "503 engine_restarting"}
_PAUSE = 0.2  # of a client that was refused; Retry-After says five seconds


@dataclass
class Death:
    """One engine's end, by ``time.monotonic()``, and when there was another."""

    kind: str
    """``killed``, ``stopped``, or ``killed twice``: the next one while it started, too."""
    moment: float
    back: float = 0.0
    seconds_allowed: float = LONGEST_HANG
    """Within which those who wait must be told."""


class _Chaos:
    def __init__(self, endured: Endured, seed: int) -> None:
        self.endured = endured
        self.port = endured.port
        self.rng = random.Random(f"{seed}/chaos")
        self.answers: list[Answer] = []
        self.pids: set[int] = set()
        self.is_over = False
        self._has_answered = asyncio.Event()

    async def client(self) -> None:
        """Asks and asks."""
        while not self.is_over:
            body = {
                "prompt": [self.rng.randrange(3, 300) for _ in range(self.rng.randrange(1, 100))],
                "max_tokens": self.rng.randrange(1, 400),
                "ignore_eos": True,
                "stream": self.rng.random() < 0.5,
            }
            answer = await post(self.port, body, leave_after=120)
            self.answers.append(answer)
            if answer.is_complete:
                self._has_answered.set()
            if answer.outcome.startswith("503"):
                await asyncio.sleep(_PAUSE)

    async def fail(self, kind: str) -> Death:
        """Make the engine fail, and wait until it serves again.

        Not before it has answered somebody: the supervisor waits longer and longer for engines that never do.
        """
        self._has_answered.clear()
        await asyncio.wait_for(self._has_answered.wait(), 120)
        await asyncio.sleep(self.rng.uniform(0.2, 3.0))
        pid = await self._engine()
        death = Death(kind, time.monotonic())
        if kind == "stopped":
            os.kill(pid, signal.SIGSTOP)
            # The watch looks four times in that time, and once a second at least.
            death.seconds_allowed += STALL_TIMEOUT + min(1.0, STALL_TIMEOUT / 4)
        else:
            os.kill(pid, signal.SIGKILL)
        if kind == "killed twice":
            second = await self._next_engine(pid)
            await asyncio.sleep(self.rng.uniform(0.0, 1.0))
            with contextlib.suppress(ProcessLookupError):
                os.kill(second, signal.SIGKILL)
            self.pids.add(second)
            pid = second
        await self._next_engine(pid)  # with SIGSTOP it takes a while
        await self._until_ready()
        death.back = time.monotonic()
        return death

    async def _engine(self) -> int:
        return await self._next_engine(None)

    async def _next_engine(self, before: int | None) -> int:
        for _ in range(60_000):
            pid = self.endured.engine_pid()
            if pid is not None and pid != before:
                self.pids.add(pid)
                return pid
            await asyncio.sleep(0.01)
        raise TimeoutError("no engine process is started")

    async def _until_ready(self) -> None:
        for _ in range(30_000):
            if (await get(self.port, "/ready")).status == 200:
                return
            await asyncio.sleep(0.02)
        raise TimeoutError("the engine isn't started again")

    def longest_hang(self, death: Death) -> float:
        """Seconds that the last of those who were waiting at that moment had to wait for their answer."""
        waits = [
            answer.finished - death.moment
            for answer in self.answers
            if answer.sent < death.moment < answer.finished
        ]
        return max(waits, default=0.0)


async def _run(endured: Endured, findings: Findings, seed: int, kinds: list[str], num_clients: int) -> None:
    chaos = _Chaos(endured, seed)
    counts = await endured.counts_at_rest()
    before = {name: counts[name] for name in ("tasks", "open files", "threads")}  # another engine has others
    clients = [asyncio.create_task(chaos.client()) for _ in range(num_clients)]
    deaths = []
    for kind in kinds:
        deaths.append(await chaos.fail(kind))
        print(f"  {kind}: back after {deaths[-1].back - deaths[-1].moment:.2f} s", flush=True)
    chaos.is_over = True
    await asyncio.gather(*clients)
    health = await until_idle(chaos.port)
    after = await endured.counts_settled(before)

    outcomes = Counter(answer.outcome for answer in chaos.answers)
    hangs = [chaos.longest_hang(death) for death in deaths]
    # Until there was another: from the moment at which it was given up.
    absences = [
        death.back - death.moment - (STALL_TIMEOUT if death.kind == "stopped" else 0.0) for death in deaths
    ]
    cold, allowed = endured.start_seconds, COLD_START_FACTOR * endured.start_seconds + COLD_START_ALLOWANCE
    findings.figures = {
        "clients": num_clients,
        "deaths": dict(Counter(kinds)),
        "requests": len(chaos.answers),
        "outcomes": dict(sorted(outcomes.items())),
        "cold start, s": round(cold, 2),
        "back after, s": [round(seconds, 2) for seconds in absences],
        "longest wait after a death, s": [round(seconds, 2) for seconds in hangs],
    }
    unforeseen = {outcome: count for outcome, count in outcomes.items() if outcome not in _OUTCOMES}
    findings.promise(
        "every request ends with tokens or the reason", not unforeseen, unforeseen or dict(outcomes)
    )
    late = [
        f"{hang:.2f} s after it was {death.kind}"
        for death, hang in zip(deaths, hangs, strict=True)
        if hang > death.seconds_allowed
    ]
    findings.promise(
        f"no client waits longer than {LONGEST_HANG:g} s after a death (a hang: and the stall timeout)",
        not late,
        late or f"at most {max(hangs):.2f} s",
        takes_quiet=True,
    )
    twice = [death.kind == "killed twice" for death in deaths]
    slow = [
        f"{seconds:.2f} s"
        for seconds, is_twice in zip(absences, twice, strict=True)
        if seconds > allowed * (2 if is_twice else 1)
    ]
    findings.promise(
        f"it serves again within {COLD_START_FACTOR:g} times the cold start and {COLD_START_ALLOWANCE:g} s "
        "(killed while it started: twice that)",
        not slow,
        slow or f"at most {max(absences):.2f} s, and a cold start took {cold:.2f} s",
        takes_quiet=True,
    )
    findings.promise("no block is left in use", health["kv_cache_usage"] == 0.0, health["kv_cache_usage"])
    findings.promise("no task, thread or file is left", before == after, f"{before} before, {after} after")
    left = [pid for pid in chaos.pids - {endured.engine_pid()} if is_running(pid)]
    findings.promise("no engine process is left behind", not left, left)
    sockets = endured.sockets_left()
    findings.promise("one folder of sockets is there", len(sockets) == 1, sockets)


def _stop_everything(endured: Endured, findings: Findings) -> None:
    """The server is killed, too: nobody is there to clean up but the engine itself."""
    engine = endured.engine_pid()
    endured.server.process.kill()
    endured.server.process.wait()
    end = time.monotonic() + 30
    while engine is not None and is_running(engine) and time.monotonic() < end:
        time.sleep(0.01)
    is_gone = engine is not None and not is_running(engine)
    findings.promise("the engine ends with a server that is killed", is_gone, f"process {engine}")
    sockets = endured.sockets_left()
    findings.promise("no folder of sockets is left", not sockets, sockets)


def run(*, seed: int, quick: bool) -> Findings:
    """20 kills, 4 of which hit the next engine, too, while it starts, and 5 hangs; quick: 2 kills."""
    findings = Findings()
    kinds = ["killed"] * 16 + ["killed twice"] * 4 + ["stopped"] * 5
    if quick:
        kinds = ["killed", "killed twice"]
    random.Random(seed).shuffle(kinds)
    flags = ("--max-model-len", "512", "--kv-cache-memory", "1MB")
    with endured_server(*flags, "--engine-stall-timeout", str(STALL_TIMEOUT)) as endured:
        asyncio.run(_run(endured, findings, seed, kinds, 8 if quick else NUM_CLIENTS))
        _stop_everything(endured, findings)
    return findings
