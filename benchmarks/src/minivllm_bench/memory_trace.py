"""Where the KV memory goes while the engine serves: its own scheduler, under load, over each allocation.

Users in a closed loop, more than fit at once, so that requests always wait and memory is the limit. The
simulated runner makes each step take one unit of virtual time; at each step, between scheduling and the next,
the block manager is asked for its usage. What is averaged is the middle of the run: from the first tenth of
the requests having ended to the first nine tenths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minivllm.config import BLOCK_SIZE, EngineConfig
from minivllm.engine.block_manager import BlockManager, ContiguousBlockManager, PagedBlockManager
from minivllm.engine.engine import Engine
from minivllm.engine.scheduler import ScheduledBatch, Scheduler
from minivllm.request import EngineInfo
from minivllm_bench.block_map import KINDS, BlockMap
from minivllm_bench.reservation import RESERVATIONS, ReservingBlockManager
from minivllm_bench.simulator.clock import VirtualClock
from minivllm_bench.simulator.runner import SimulatedRunner, StepCost
from minivllm_bench.simulator.simulation import Simulation
from minivllm_bench.workloads import Session

MIDDLE = (0.1, 0.9)
"""Shares of the requests that have ended where averaging begins and ends."""
_STEP = StepCost(host=0.0, device=1.0)

MakeBlockManager = Callable[[int, int], BlockManager]
"""(blocks of the pool, tokens of the longest sequence) → a manager."""


def _reserving(name: str) -> MakeBlockManager:
    return lambda num_blocks, max_model_len: ReservingBlockManager(
        num_blocks, max_model_len=max_model_len, reserve=RESERVATIONS[name](max_model_len)
    )


ALLOCATIONS: dict[str, MakeBlockManager] = {
    "paged": lambda num_blocks, max_model_len: PagedBlockManager(num_blocks, use_prefix_cache=True),
    "contiguous": lambda num_blocks, max_model_len: ContiguousBlockManager(
        num_blocks, max_model_len=max_model_len
    ),
    **{name: _reserving(name) for name in RESERVATIONS},
}
"""What is compared: the engine's own two, and the paper's three."""


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """One allocation's run: means over the steps of its middle."""

    shares: dict[str, float]
    """Of the whole KV memory, by kind (``block_map.KINDS``); 1 together."""
    allocated_without_token: float
    """Of the memory that sequences have been given, an allocator's rounding included: without a token."""
    sequences: float
    """That hold memory at once."""
    waiting: float
    """Share of the steps in which at least one request waited: below 1, memory wasn't the limit."""
    steps: int
    """In that middle."""
    preemptions: int
    """In the whole run."""
    block_map: BlockMap
    """When half of the requests had ended."""


class Meter:
    """Looks at a scheduler in each step, when its blocks are allocated."""

    def __init__(self, num_requests: int) -> None:
        self._num_requests = num_requests
        self._num_ended = 0
        self._slots: Counter[str] = Counter()  # summed over steps, as all that follows
        self._num_allocated = self._num_sequences = self._num_waiting = self._num_steps = 0
        self._block_map: BlockMap | None = None

    def look(self, scheduler: Scheduler, batch: ScheduledBatch) -> None:
        """Take a step's usage, if it is one of the middle."""
        ended = self._num_ended / self._num_requests
        if MIDDLE[0] <= ended < MIDDLE[1]:
            manager = scheduler.block_manager
            usage = manager.usage()
            slots = (usage.held, usage.reserved, usage.internal_waste, usage.external_waste, usage.free)
            for kind, count in zip(KINDS, slots, strict=True):
                self._slots[kind] += count
            self._num_allocated += manager.num_used_blocks * BLOCK_SIZE
            self._num_sequences += len(scheduler.running)
            self._num_waiting += bool(scheduler.waiting)
            self._num_steps += 1
            if self._block_map is None and ended >= 0.5:
                self._block_map = BlockMap.take(manager, scheduler.running)
        for item in batch.requests:
            self._num_ended += item.start + item.num_tokens + 1 == item.request.max_total_tokens

    def figures(self, preemptions: int) -> MemoryFigures:
        """The means, once all requests have ended."""
        assert self._block_map is not None, "all requests have ended, so half of them have"
        steps = self._num_steps
        return MemoryFigures(
            shares={kind: self._slots[kind] / self._slots.total() for kind in KINDS},
            allocated_without_token=1 - self._slots["tokens"] / self._num_allocated,
            sequences=self._num_sequences / steps,
            waiting=self._num_waiting / steps,
            steps=steps,
            preemptions=preemptions,
            block_map=self._block_map,
        )


def measure(
    make_block_manager: MakeBlockManager,
    sessions: Sequence[Session],
    *,
    users: int,
    num_blocks: int,
    max_model_len: int,
) -> MemoryFigures:
    """Serve all sessions in a closed loop of so many users, and see where the memory was.

    Args:
        sessions: what the users do, each of at most ``max_model_len`` tokens; they have at least ten requests
            for each user.
        num_blocks: of the pool: enough for one sequence of ``max_model_len`` tokens.

    Raises:
        AssertionError: a request failed, or a block was lost.
    """
    meter = Meter(sum(len(session.turns) for session in sessions))
    clock = VirtualClock()

    def step(batch: ScheduledBatch) -> StepCost:
        meter.look(engine.scheduler, batch)
        return _STEP

    engine = Engine(
        EngineConfig(max_num_seqs=users),
        SimulatedRunner(step, clock, runs_ahead=False),
        EngineInfo(max_model_len=max_model_len, vocab_size=len(sessions) + 1),
        num_blocks=num_blocks,
        max_num_batched_tokens=users + 2 * max_model_len,  # no prompt is chunked for long
        eos_token_ids=frozenset(),
        clock=clock,
        block_manager=make_block_manager(num_blocks, max_model_len),
    )
    records = Simulation(engine, clock, users=users, sessions=iter(sessions)).run()
    engine.check_integrity()
    failed = [record.error for record in records if not record.is_complete]
    if failed or engine.block_manager.num_used_blocks:
        raise AssertionError(f"{len(failed)} requests failed, the first: {failed[:1]}")
    return meter.figures(engine.stats().num_preemptions)
