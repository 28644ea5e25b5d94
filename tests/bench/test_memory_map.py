"""The block map shows every slot of the pool once, as what the block manager's usage says it is."""

from __future__ import annotations

import itertools
import random
import xml.etree.ElementTree as ET
from io import BytesIO

import pytest

from minivllm.config import BLOCK_SIZE, EngineConfig
from minivllm.engine.engine import Engine
from minivllm.engine.scheduler import ScheduledBatch
from minivllm.request import EngineInfo
from minivllm_bench.block_map import BLOCKS_PER_ROW, KINDS, MAX_ROWS, BlockMap, Span, draw
from minivllm_bench.memory_trace import ALLOCATIONS
from minivllm_bench.simulator.clock import VirtualClock
from minivllm_bench.simulator.runner import SimulatedRunner, StepCost
from minivllm_bench.simulator.simulation import Simulation
from minivllm_bench.workloads import shared_prefix, sharegpt_like

MAX_MODEL_LEN, NUM_BLOCKS = 300, 100
SHORT = sharegpt_like(mean_prompt=50, mean_output=60, longest=MAX_MODEL_LEN)


@pytest.mark.parametrize("workload", [SHORT, shared_prefix(48)], ids=["short", "shared prefix"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_slot_at_every_step(allocation: str, workload: object) -> None:
    maps: list[BlockMap] = []

    def step(batch: ScheduledBatch) -> StepCost:
        manager, running = engine.block_manager, engine.scheduler.running
        found, usage = BlockMap.take(manager, running), manager.usage()
        counts = [found.count(kind) for kind in KINDS]
        wanted = [usage.held, usage.reserved, usage.internal_waste, usage.external_waste, usage.free]
        assert counts == wanted
        edges = [(span.start, span.start + span.num_slots) for span in found.spans]
        assert edges[0][0] == 0
        assert edges[-1][1] == NUM_BLOCKS * BLOCK_SIZE
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(edges))
        assert found.num_sequences == len(running)
        for number, request in enumerate(running):
            if allocation != "paged":  # where a block belongs to several, it shows for the first
                held = sum(s.num_slots for s in found.spans if (s.kind, s.sequence) == ("tokens", number))
                assert held == request.num_computed_tokens
        assert running[found.longest].num_computed_tokens == max(r.num_computed_tokens for r in running)
        maps.append(found)
        return StepCost(0.0, 1.0)

    clock = VirtualClock()
    engine = Engine(
        EngineConfig(),
        SimulatedRunner(step, clock, runs_ahead=False),
        EngineInfo(max_model_len=MAX_MODEL_LEN, vocab_size=1000),
        num_blocks=NUM_BLOCKS,
        max_num_batched_tokens=64,
        eos_token_ids=frozenset(),
        clock=clock,
        block_manager=ALLOCATIONS[allocation](NUM_BLOCKS, MAX_MODEL_LEN),
    )
    sessions = itertools.islice(workload(random.Random(3)), 40)  # type: ignore[operator]
    records = Simulation(engine, clock, users=20, sessions=sessions).run()
    assert len(records) == 40
    assert all(record.is_complete for record in records)
    engine.check_integrity()
    assert len({found.num_sequences for found in maps}) > 2


def test_a_run_wraps_and_a_large_pool_is_cut() -> None:
    num_blocks = MAX_ROWS * BLOCKS_PER_ROW + 1
    slots = num_blocks * BLOCK_SIZE
    large = BlockMap(num_blocks, [Span(0, slots - 5, "tokens", 0), Span(slots - 5, 5, "reserved", 0)], 1, 0)
    small = BlockMap(3, [Span(0, 3 * BLOCK_SIZE, "free", None)], 0, 0)
    file = BytesIO()
    draw({"large": large, "small": small}).savefig(file, format="svg")
    text = file.getvalue().decode()
    assert ET.fromstring(text).tag.endswith("svg")
    assert f"first {MAX_ROWS * BLOCKS_PER_ROW} of {num_blocks} blocks" in text
    assert "3 of 3 blocks" not in text
