"""Reservation by buddies against brute force: which chunk, what is free, what each slot is."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.request import Request, SamplingParams
from minivllm_bench.buddy import BuddyAllocator, next_power_of_two
from minivllm_bench.reservation import RESERVATIONS, ReservingBlockManager

S = 16  # slots in a block
MACHINE_SETTINGS = settings(max_examples=100, stateful_step_count=40)


class Pool:
    """A pool as a list of owners. Chunks are found by trying every aligned power of two, largest first."""

    def __init__(self, num_units: int) -> None:
        self.owners: list[str | None] = [None] * num_units

    def free_chunks(self) -> list[range]:
        covered: set[int] = set()
        found = []
        for order in (5, 4, 3, 2, 1, 0):
            for start in range(0, len(self.owners) - 2**order + 1, 2**order):
                chunk = range(start, start + 2**order)
                if all(self.owners[unit] is None and unit not in covered for unit in chunk):
                    found.append(chunk)
                    covered.update(chunk)
        return sorted(found, key=lambda chunk: chunk.start)

    def best(self, num_units: int) -> range | None:
        """The lowest of the smallest chunks that will do, cut down to the power of two that is needed."""
        size = next(2**order for order in range(10) if 2**order >= num_units)
        fitting = sorted(
            (chunk for chunk in self.free_chunks() if len(chunk) >= size),
            key=lambda chunk: (len(chunk), chunk.start),
        )
        return range(fitting[0].start, fitting[0].start + size) if fitting else None

    def give(self, owner: str, chunk: range) -> None:
        for unit in chunk:
            self.owners[unit] = owner

    def take_back(self, owner: str) -> None:
        self.owners = [None if other == owner else other for other in self.owners]


class BuddyMachine(RuleBasedStateMachine):
    @initialize(num_units=st.integers(0, 50))
    def start(self, num_units: int) -> None:
        self.buddies, self.pool = BuddyAllocator(num_units), Pool(num_units)
        self.starts: dict[str, int] = {}
        self.num_made = 0

    @rule(num_units=st.one_of(st.integers(1, 4), st.integers(1, 40)))
    def allocate(self, num_units: int) -> None:
        expected = self.pool.best(num_units)
        chunk = self.buddies.allocate(num_units)
        assert chunk == expected
        if chunk is not None:
            self.num_made += 1
            owner = str(self.num_made)
            self.pool.give(owner, chunk)
            self.starts[owner] = chunk.start

    @precondition(lambda self: self.starts)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.starts)))
        self.buddies.free(self.starts.pop(owner))
        self.pool.take_back(owner)

    @invariant()
    def the_same_is_free(self) -> None:
        assert self.buddies.free_chunks() == self.pool.free_chunks()


class ReservingMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 40),
        max_model_len=st.integers(2, 200),
        name=st.sampled_from([*RESERVATIONS]),
    )
    def start(self, num_blocks: int, max_model_len: int, name: str) -> None:
        self.name, self.max_model_len, self.pool = name, max_model_len, Pool(num_blocks)
        self.manager = ReservingBlockManager(
            num_blocks, max_model_len=max_model_len, reserve=RESERVATIONS[name](max_model_len)
        )
        self.live: dict[str, Request] = {}
        self.asked: dict[str, int] = {}
        self.num_made = 0
        self.refused = 0  # blocks

    def tokens_to_ask_for(self, num_prompt: int, num_output: int) -> int:
        if self.name == "orca-max":
            return self.max_model_len
        if self.name == "orca-oracle":
            return num_prompt + num_output
        doubled = 1
        while doubled < num_output:
            doubled *= 2
        return min(num_prompt + doubled, self.max_model_len)

    @rule(data=st.data(), headroom=st.integers(0, 3))
    def admit(self, data: st.DataObject, headroom: int) -> None:
        num_prompt = data.draw(st.integers(1, self.max_model_len - 1))
        num_output = data.draw(st.integers(1, self.max_model_len - num_prompt))
        self.num_made += 1
        name, sampling = str(self.num_made), SamplingParams(max_tokens=num_output)
        request = Request(name, [1] * num_prompt, sampling, seed=0, max_total_tokens=num_prompt + num_output)
        asked = self.tokens_to_ask_for(num_prompt, num_output)
        chunk = self.pool.best(-(-asked // S))
        assert self.manager.admit(request, headroom) == (chunk is not None)
        assert request.num_computed_tokens == 0
        assert list(request.block_table) == list(chunk or [])
        self.refused = 0 if chunk else -(-asked // S)
        if chunk:
            self.pool.give(name, chunk)
            self.live[name], self.asked[name] = request, asked

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.one_of(st.just(1), st.integers(1, 100)))
    def compute(self, data: st.DataObject, count: int) -> None:
        request = data.draw(st.sampled_from([*self.live.values()]))
        table = list(request.block_table)
        fits = request.num_computed_tokens + count <= self.asked[request.request_id]
        assert self.manager.grow(request, count) == fits
        assert list(request.block_table) == table
        self.manager.commit(request, min(count, request.max_total_tokens - request.num_computed_tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        request = self.live.pop(name)
        self.manager.free(request)
        assert (list(request.block_table), request.num_computed_tokens) == ([], 0)
        self.pool.take_back(name)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_integrity()
        num_free = self.pool.owners.count(None)
        assert self.manager.num_free_blocks == num_free
        assert self.manager.num_used_blocks == len(self.pool.owners) - num_free

    @invariant()
    def every_slot_is_what_usage_says(self) -> None:
        counts = dict.fromkeys(("held", "reserved", "internal_waste", "external_waste", "free"), 0)
        for name, request in self.live.items():
            for position in range(len(request.block_table) * S):
                if position < request.num_computed_tokens:
                    counts["held"] += 1
                elif position < request.max_total_tokens:
                    counts["reserved"] += 1
                elif position < self.asked[name]:
                    counts["internal_waste"] += 1
                else:
                    counts["external_waste"] += 1
        stranded = [block for c in self.pool.free_chunks() if len(c) < self.refused for block in c]
        assert sorted(self.manager.stranded_blocks()) == stranded
        counts["external_waste"] += len(stranded) * S
        counts["free"] = (self.pool.owners.count(None) - len(stranded)) * S
        usage = self.manager.usage()
        assert {name: getattr(usage, name) for name in counts} == counts
        assert usage.total == len(self.pool.owners) * S == sum(counts.values())

    @invariant()
    def what_fits_ever_is_what_fits_now_when_empty(self) -> None:
        if not self.live:
            fits = self.pool.best(-(-self.max_model_len // S)) is not None
            assert self.manager.can_ever_fit(self.max_model_len) == fits
        assert not self.manager.can_ever_fit(self.max_model_len + 1)


TestBuddies = BuddyMachine.TestCase
TestBuddies.settings = MACHINE_SETTINGS
TestReserving = ReservingMachine.TestCase
TestReserving.settings = MACHINE_SETTINGS


def test_next_power_of_two() -> None:
    assert [next_power_of_two(n) for n in (1, 2, 3, 4, 5, 25, 32, 33)] == [1, 2, 4, 4, 8, 32, 32, 64]


def test_the_papers_example_of_a_power_of_two() -> None:
    """Section 6.1: where the output's true length is 25, 32 positions are reserved for it."""
    assert RESERVATIONS["orca-pow2"](2048)(7, 25) == 7 + 32
    assert RESERVATIONS["orca-pow2"](2048)(1000, 1030) == 2048, "no longer than the model's longest"


@pytest.mark.parametrize("fault", ["lost", "broken run", "two owners"])
def test_check_integrity_notices(fault: str) -> None:
    manager = ReservingBlockManager(16, max_model_len=64, reserve=RESERVATIONS["orca-max"](64))
    first, second = (
        Request(name, [1] * 20, SamplingParams(), seed=0, max_total_tokens=40) for name in ("a", "b")
    )
    assert manager.admit(first, 0)
    assert manager.admit(second, 0)
    manager.check_integrity()
    if fault == "lost":
        manager._buddies.allocate(1)
    elif fault == "broken run":
        first.block_table = first.block_table[::-1]
    else:
        second.block_table = first.block_table[:]
    with pytest.raises(AssertionError):
        manager.check_integrity()
