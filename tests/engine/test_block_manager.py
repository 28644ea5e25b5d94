"""Both block managers against brute-force models: who owns which block, and whose keys and values it holds.

The paged model knows no hashes. It writes, for every token that is "computed", the whole token
prefix that this token's keys and values depend on into the token's slot. A block that was shared
wrongly, handed out twice or overwritten shows up as a live request whose slots hold another prefix.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.engine.block_manager import BlockManager, ContiguousBlockManager, PagedBlockManager, blocks_for
from minivllm.request import Request, SamplingParams

S = 16  # slots in a block
MACHINE_SETTINGS = settings(max_examples=100, stateful_step_count=50)

Prefix = tuple[int, ...]


def make_request(name: str, tokens: list[int], max_total_tokens: int | None = None) -> Request:
    limit = len(tokens) + 64 if max_total_tokens is None else max_total_tokens
    return Request(name, tokens, SamplingParams(max_tokens=None), seed=0, max_total_tokens=limit)


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Blocks of one repeated token out of two, and a tail: prefixes collide all the time."""
    blocks = draw(st.lists(st.sampled_from([0, 0, 1]), max_size=4))
    tail = draw(st.lists(st.integers(0, 1), min_size=0 if blocks else 1, max_size=S - 1))
    return [token for block in blocks for token in [block] * S] + tail


def slots_of(request: Request) -> Counter[str]:
    """What each slot of a request's own table is, one by one."""
    kinds: Counter[str] = Counter()
    for position in range(len(request.block_table) * S):
        if position < request.num_computed_tokens:
            kinds["held"] += 1
        elif position < request.max_total_tokens:
            kinds["reserved"] += 1
        else:
            kinds["internal_waste"] += 1
    return kinds


class PagedMachine(RuleBasedStateMachine):
    """Random admissions, growth, computed tokens and frees, in any order."""

    @initialize(
        num_blocks=st.one_of(st.integers(1, 6), st.integers(6, 20)),
        use_prefix_cache=st.sampled_from([True, True, False]),
    )
    def start(self, num_blocks: int, use_prefix_cache: bool) -> None:
        self.manager = PagedBlockManager(num_blocks, use_prefix_cache=use_prefix_cache)
        self.num_blocks = num_blocks
        self.use_prefix_cache = use_prefix_cache
        self.waiting: list[Request] = []
        self.live: list[Request] = []
        self.num_made = 0
        self.slot_contents: dict[int, Prefix] = {}  # slot → the prefix whose KV was last written there
        self.block_of_prefix: dict[Prefix, int] = {}  # full blocks that can be found again
        self.unused: list[Prefix] = []  # those that nobody holds, least recently used first
        self.num_queried = self.num_hit = 0

    # What the manager should do, said without it

    def owners(self) -> Counter[int]:
        return Counter(block for request in self.live for block in request.block_table)

    def num_free(self) -> int:
        return self.num_blocks - len(self.owners())

    def findable_blocks(self, request: Request) -> list[Prefix]:
        found: list[Prefix] = []
        for end in range(S, len(request.token_ids), S):  # never the last token
            prefix = tuple(request.token_ids[:end])
            if prefix not in self.block_of_prefix:
                break
            found.append(prefix)
        return found

    def check_allocated(self, blocks: list[int], owned_before: set[int]) -> None:
        """New blocks come from the empty ones, and after those from the least recently used prefixes."""
        assert len(set(blocks)) == len(blocks)
        assert not set(blocks) & owned_before
        assert all(0 <= block < self.num_blocks for block in blocks)
        kept = {self.block_of_prefix[prefix] for prefix in self.unused}
        num_empty = self.num_blocks - len(owned_before) - len(kept)
        evicted, self.unused = self.unused[: max(0, len(blocks) - num_empty)], self.unused[:]
        del self.unused[: len(evicted)]
        expected = {self.block_of_prefix.pop(prefix) for prefix in evicted}
        assert set(blocks) & kept == expected, "eviction isn't least recently used first"

    # Rules

    @rule(prompts=st.lists(prompts(), min_size=1, max_size=3), num_more=st.integers(0, 40))
    def arrive(self, prompts: list[list[int]], num_more: int) -> None:
        for prompt in prompts:
            self.num_made += 1
            self.waiting.append(make_request(f"r{self.num_made}", prompt, len(prompt) + num_more))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), headroom=st.integers(0, 3))
    def admit_one(self, data: st.DataObject, headroom: int) -> None:
        self.admit(data.draw(st.sampled_from(self.waiting)), headroom)

    @precondition(lambda self: self.waiting)
    @rule()
    def admit_all_that_fit(self) -> None:
        for request in list(self.waiting):
            self.admit(request, headroom=0)

    def admit(self, request: Request, headroom: int) -> None:
        found = self.findable_blocks(request) if self.use_prefix_cache else []
        owned = set(self.owners())
        num_revived = len([prefix for prefix in found if self.block_of_prefix[prefix] not in owned])
        num_new = blocks_for(len(request.token_ids)) - len(found)
        should_fit = num_new + num_revived + headroom <= self.num_free()

        assert self.manager.admit(request, headroom) == should_fit
        if not should_fit:
            assert list(request.block_table) == []
            assert request.num_computed_tokens == 0
            return
        table = list(request.block_table)
        assert table[: len(found)] == [self.block_of_prefix[prefix] for prefix in found]
        assert request.num_computed_tokens == len(found) * S < len(request.token_ids)
        assert len(table) == blocks_for(len(request.token_ids))
        if self.use_prefix_cache:
            self.num_queried += len(request.token_ids)
            self.num_hit += len(found) * S
        self.unused = [prefix for prefix in self.unused if prefix not in found]
        self.check_allocated(table[len(found) :], owned | set(table[: len(found)]))
        self.waiting.remove(request)
        self.live.append(request)

    @precondition(lambda self: self.live)
    @rule(token=st.integers(0, 1), count=st.sampled_from([1, S]), share=st.sampled_from([1.0, 0.6, 0.1]))
    def step(self, token: int, count: int, share: float) -> None:
        """Some tokens of every live request, as in a step of the engine."""
        for request in self.live:
            if request.num_uncomputed_tokens == 0:
                room = request.max_total_tokens - len(request.token_ids)
                request.token_ids += [token] * min(count, room)
            if request.num_uncomputed_tokens:
                self.grow_and_compute(request, max(1, int(share * request.num_uncomputed_tokens)))

    def grow_and_compute(self, request: Request, num_tokens: int) -> None:
        before, owned = list(request.block_table), set(self.owners())
        end = request.num_computed_tokens + num_tokens
        num_new = max(0, blocks_for(end) - len(before))
        should_fit = num_new <= self.num_free()
        assert self.manager.grow(request, num_tokens) == should_fit
        if not should_fit:
            assert list(request.block_table) == before
            return
        assert list(request.block_table[: len(before)]) == before
        self.check_allocated(request.block_table[len(before) :], owned)
        assert len(request.block_table) == len(before) + num_new

        start = request.num_computed_tokens
        for position in range(start, end):
            slot = request.block_table[position // S] * S + position % S
            self.slot_contents[slot] = tuple(request.token_ids[: position + 1])
        self.manager.commit(request, num_tokens)
        for index in range(start // S, end // S):
            if self.use_prefix_cache:
                prefix = tuple(request.token_ids[: (index + 1) * S])
                self.block_of_prefix.setdefault(prefix, request.block_table[index])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), is_preempted=st.booleans())
    def free_one(self, data: st.DataObject, is_preempted: bool) -> None:
        self.free(data.draw(st.sampled_from(self.live)), is_preempted)

    @precondition(lambda self: self.live)
    @rule()
    def free_all_but_the_newest(self) -> None:
        for request in self.live[:-1]:
            self.free(request, is_preempted=False)

    def free(self, request: Request, is_preempted: bool) -> None:
        table = list(request.block_table)
        self.live.remove(request)
        self.manager.free(request)
        assert list(request.block_table) == []
        assert request.num_computed_tokens == 0
        owned = set(self.owners())
        prefix_of_block = {block: prefix for prefix, block in self.block_of_prefix.items()}
        self.unused += [
            prefix_of_block[block]
            for block in reversed(table)
            if block in prefix_of_block and block not in owned
        ]
        if is_preempted:
            self.waiting.append(request)

    # What must always hold

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_integrity()
        assert self.manager.num_free_blocks == self.num_free()
        assert self.manager.num_used_blocks == len(self.owners())
        assert (self.manager.num_queried_tokens, self.manager.num_hit_tokens) == (
            self.num_queried,
            self.num_hit,
        )

    @invariant()
    def every_slot_holds_its_own_prefix(self) -> None:
        for request in self.live:
            for position in range(request.num_computed_tokens):
                slot = request.block_table[position // S] * S + position % S
                assert self.slot_contents[slot] == tuple(request.token_ids[: position + 1])

    @invariant()
    def usage_is_a_count_of_slots(self) -> None:
        # Walk the slots of the pool; a shared block is walked once.
        kinds: Counter[str] = Counter(free=self.num_free() * S)
        counted: set[int] = set()
        for request in self.live:
            for position in range(len(request.block_table) * S):
                slot = request.block_table[position // S] * S + position % S
                if slot not in counted:
                    counted.add(slot)
                    is_held, may_fill = (
                        position < request.num_computed_tokens,
                        position < request.max_total_tokens,
                    )
                    kinds["held" if is_held else "reserved" if may_fill else "internal_waste"] += 1
        usage = self.manager.usage()
        assert usage.total == self.num_blocks * S == sum(kinds.values())
        assert (usage.held, usage.reserved, usage.internal_waste) == (
            kinds["held"],
            kinds["reserved"],
            kinds["internal_waste"],
        )
        assert (usage.free, usage.external_waste) == (kinds["free"], 0)

    @invariant()
    def fits_ever(self) -> None:
        for num_tokens in (1, self.num_blocks * S, self.num_blocks * S + 1):
            assert self.manager.can_ever_fit(num_tokens) == (num_tokens <= self.num_blocks * S)


class ContiguousMachine(RuleBasedStateMachine):
    """The pool as a plain list of owners; first fit by trying every start."""

    @initialize(num_blocks=st.integers(1, 24), max_model_len=st.integers(1, 70))
    def start(self, num_blocks: int, max_model_len: int) -> None:
        self.manager = ContiguousBlockManager(num_blocks, max_model_len=max_model_len)
        self.max_model_len = max_model_len
        self.run_length = -(-max_model_len // S)
        self.owners: list[str | None] = [None] * num_blocks
        self.live: list[Request] = []
        self.num_made = 0

    def first_fit(self) -> int | None:
        for start in range(len(self.owners) - self.run_length + 1):
            if not any(self.owners[start : start + self.run_length]):
                return start
        return None

    @rule(data=st.data(), headroom=st.integers(0, 3))
    def admit(self, data: st.DataObject, headroom: int) -> None:
        num_prompt = data.draw(st.integers(1, self.max_model_len))
        max_total_tokens = data.draw(st.integers(num_prompt, self.max_model_len))
        self.num_made += 1
        request = make_request(f"r{self.num_made}", [1] * num_prompt, max_total_tokens)
        start = self.first_fit()
        assert self.manager.admit(request, headroom) == (start is not None)
        assert request.num_computed_tokens == 0
        if start is None:
            assert list(request.block_table) == []
            return
        run = list(range(start, start + self.run_length))
        assert list(request.block_table) == run
        for block in run:
            self.owners[block] = request.request_id
        self.live.append(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def grow_and_compute(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        table = list(request.block_table)
        num_tokens = data.draw(st.integers(1, 2 * S))
        fits = request.num_computed_tokens + num_tokens <= self.run_length * S
        assert self.manager.grow(request, num_tokens) == fits
        assert list(request.block_table) == table
        if request.num_computed_tokens + num_tokens <= request.max_total_tokens:
            self.manager.commit(request, num_tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.live.remove(request)
        self.manager.free(request)
        assert (list(request.block_table), request.num_computed_tokens) == ([], 0)
        self.owners = [None if owner == request.request_id else owner for owner in self.owners]

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_integrity()
        assert self.manager.num_free_blocks == self.owners.count(None)
        assert self.manager.num_used_blocks == len(self.owners) - self.owners.count(None)
        table_owners: list[str | None] = [None] * len(self.owners)
        for request in self.live:
            for block in request.block_table:
                table_owners[block] = request.request_id
        assert table_owners == self.owners

    @invariant()
    def usage_is_a_count_of_slots(self) -> None:
        kinds: Counter[str] = sum((slots_of(request) for request in self.live), Counter())
        # How many more could be admitted: fill the pool and see.
        owners = list(self.owners)
        num_usable = 0
        while (start := self.first_fit()) is not None:
            self.owners[start : start + self.run_length] = ["filler"] * self.run_length
            num_usable += self.run_length
        num_too_short = self.owners.count(None)
        self.owners = owners
        usage = self.manager.usage()
        assert (usage.held, usage.reserved, usage.internal_waste) == (
            kinds["held"],
            kinds["reserved"],
            kinds["internal_waste"],
        )
        assert (usage.free, usage.external_waste) == (num_usable * S, num_too_short * S)
        assert usage.total == len(self.owners) * S
        assert usage.total == sum(kinds.values()) + (num_usable + num_too_short) * S

    @invariant()
    def fits_ever(self) -> None:
        for num_tokens in (1, self.run_length * S, self.run_length * S + 1):
            fits = num_tokens <= self.run_length * S and self.run_length <= len(self.owners)
            assert self.manager.can_ever_fit(num_tokens) == fits


TestPaged = PagedMachine.TestCase
TestPaged.settings = MACHINE_SETTINGS
TestContiguous = ContiguousMachine.TestCase
TestContiguous.settings = MACHINE_SETTINGS


def run_whole(manager: BlockManager, request: Request) -> None:
    """Admit a request and compute all its tokens."""
    assert manager.admit(request, 0)
    manager.commit(request, request.num_uncomputed_tokens)


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (0, 1, 15, 16, 17, 32, 33)] == [0, 1, 1, 1, 2, 2, 3]


def test_least_recently_used_prefix_goes_first_and_its_tail_before_its_head() -> None:
    manager = PagedBlockManager(8, use_prefix_cache=True)
    old, young = make_request("old", [1] * 33), make_request("young", [2] * 33)
    for request in (old, young):
        run_whole(manager, request)
    manager.free(old)
    manager.free(young)

    # Each has left two full blocks; the third was not full, so nobody can find it again.
    taker = make_request("taker", [3] * 79)
    run_whole(manager, taker)  # the four empty blocks, and the second of old's
    manager.free(taker)
    for token, num_found in ((2, 32), (1, 16)):
        again = make_request("again", [token] * 33)
        assert manager.admit(again, 0)
        assert again.num_computed_tokens == num_found
        manager.free(again)
    manager.check_integrity()


def test_a_hit_makes_a_prefix_recently_used() -> None:
    manager = PagedBlockManager(3, use_prefix_cache=True)
    for token in (1, 2, 3):
        request = make_request(f"fill{token}", [token] * 16)
        run_whole(manager, request)
        manager.free(request)
    touch = make_request("touch", [1] * 17)
    assert not manager.admit(touch, headroom=2)  # one revived, one new: one block would be left
    assert manager.admit(touch, headroom=1)  # evicts the prefix of 2s
    assert touch.num_computed_tokens == 16
    manager.free(touch)
    probe = make_request("probe", [2] * 17)
    assert manager.admit(probe, 0)
    assert probe.num_computed_tokens == 0


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 48])
def test_last_token_is_never_taken_from_the_cache(length: int) -> None:
    manager = PagedBlockManager(8, use_prefix_cache=True)
    first, second = make_request("first", [7] * length), make_request("second", [7] * length)
    run_whole(manager, first)
    assert manager.admit(second, 0)
    assert second.num_computed_tokens == (length - 1) // 16 * 16 < length
    assert second.num_uncomputed_tokens >= 1


def test_equal_blocks_after_different_prefixes_are_not_confused() -> None:
    manager = PagedBlockManager(16, use_prefix_cache=True)
    run_whole(manager, make_request("a", [1] * 16 + [5] * 16))
    other = make_request("b", [2] * 16 + [5] * 17)
    assert manager.admit(other, 0)
    assert other.num_computed_tokens == 0
    # Nor is a block of the middle of one prompt found at the start of another.
    shifted = make_request("c", [5] * 17)
    assert manager.admit(shifted, 0)
    assert shifted.num_computed_tokens == 0


def test_tokens_that_are_not_computed_yet_are_not_shared() -> None:
    manager = PagedBlockManager(8, use_prefix_cache=True)
    first, second = make_request("first", [1] * 40), make_request("second", [1] * 40)
    assert manager.admit(first, 0)
    manager.commit(first, 17)
    assert manager.admit(second, 0)
    assert second.num_computed_tokens == 16
    assert second.block_table[0] == first.block_table[0]
    assert not set(second.block_table[1:]) & set(first.block_table)


def test_a_prefix_is_found_again_after_only_its_head_was_evicted() -> None:
    """Two copies of a prefix: the first one's head goes, a third request's blocks must be found instead."""
    manager = PagedBlockManager(7, use_prefix_cache=True)
    tokens = [1] * 33
    leader, follower = make_request("leader", tokens), make_request("follower", tokens)
    assert manager.admit(leader, 0)
    assert manager.admit(follower, 0)
    manager.commit(leader, 16)  # the first block is the leader's, the second the follower's
    manager.commit(follower, 33)
    manager.check_integrity()
    manager.free(leader)
    filler = make_request("filler", [2] * 64)
    run_whole(manager, filler)  # evicts the leader's block
    manager.free(filler)

    third = make_request("third", tokens)
    assert manager.admit(third, 0)
    assert third.num_computed_tokens == 0
    manager.commit(third, 33)
    manager.free(follower)
    fourth = make_request("fourth", tokens)
    assert manager.admit(fourth, 0)
    assert fourth.num_computed_tokens == 32


def test_without_a_prefix_cache_nothing_is_shared_or_kept() -> None:
    manager = PagedBlockManager(4, use_prefix_cache=False)
    for name in ("a", "b"):
        request = make_request(name, [1] * 33)
        run_whole(manager, request)
        assert request.num_computed_tokens == 33
        manager.free(request)
    assert (manager.num_queried_tokens, manager.num_hit_tokens) == (0, 0)
    assert manager.num_free_blocks == 4


def test_contiguous_takes_the_first_gap() -> None:
    manager = ContiguousBlockManager(11, max_model_len=33)  # three runs of three, two blocks left over
    requests = [make_request(f"r{n}", [1] * 5) for n in range(4)]
    assert [manager.admit(request, 0) for request in requests] == [True, True, True, False]
    assert [request.block_table[0] for request in requests[:3]] == [0, 3, 6]
    manager.free(requests[1])
    manager.free(requests[0])
    assert manager.admit(requests[3], 0)
    assert list(requests[3].block_table) == [0, 1, 2]
    assert manager.usage().external_waste == 2 * S


def tamper_free(manager: PagedBlockManager) -> None:
    manager._free.pop()


def tamper_duplicate(manager: PagedBlockManager) -> None:
    manager._free.append(manager._free[0])


def tamper_in_use(manager: PagedBlockManager) -> None:
    manager._free.append(next(iter(manager._live.values())).block_table[0])


def tamper_ref_count(manager: PagedBlockManager) -> None:
    manager._ref_counts[next(iter(manager._live.values())).block_table[0]] += 1


def tamper_cached(manager: PagedBlockManager) -> None:
    manager._cached.popitem()


def tamper_key(manager: PagedBlockManager) -> None:
    manager._key_of.pop(next(iter(manager._cached)))


def tamper_table(manager: PagedBlockManager) -> None:
    table = next(iter(manager._live.values())).block_table
    table[1] = table[0]


def tamper_computed(manager: PagedBlockManager) -> None:
    next(iter(manager._live.values())).num_computed_tokens = 1000


@pytest.mark.parametrize(
    "tamper",
    [
        tamper_free,
        tamper_duplicate,
        tamper_in_use,
        tamper_ref_count,
        tamper_cached,
        tamper_key,
        tamper_table,
        tamper_computed,
    ],
)
def test_check_integrity_notices(tamper: object) -> None:
    manager = PagedBlockManager(10, use_prefix_cache=True)
    gone = make_request("gone", [1] * 40)
    run_whole(manager, gone)
    manager.free(gone)
    run_whole(manager, make_request("live", [2] * 40))
    manager.check_integrity()
    tamper(manager)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        manager.check_integrity()


def test_check_integrity_notices_overlapping_runs() -> None:
    manager = ContiguousBlockManager(9, max_model_len=48)
    first, second = make_request("a", [1]), make_request("b", [1])
    assert manager.admit(first, 0)
    assert manager.admit(second, 0)
    second.block_table = first.block_table[:]
    with pytest.raises(AssertionError):
        manager.check_integrity()


def test_check_integrity_works_under_python_O() -> None:
    code = (
        "from minivllm.engine.block_manager import PagedBlockManager\n"
        "manager = PagedBlockManager(4, use_prefix_cache=False)\n"
        "manager._free.pop()\n"
        "try:\n"
        "    manager.check_integrity()\n"
        "except AssertionError:\n"
        "    print('noticed', __debug__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-O", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stdout.strip() == "noticed False"
