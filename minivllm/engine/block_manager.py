"""Who owns which KV block. Two policies behind one interface, chosen once, in ``Engine.__init__``.

A block holds the keys and values of :data:`BLOCK_SIZE` consecutive tokens of one sequence. A
sequence's block table lists its blocks in order; block tables, model and kernels are the same for
both policies, so a comparison of the two compares allocation alone.

No tensor is seen here: blocks are integers from 0 to ``num_blocks - 1``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass

from minivllm.config import BLOCK_SIZE
from minivllm.request import PENDING_TOKEN, Request


def blocks_for(num_tokens: int) -> int:
    """How many blocks hold ``num_tokens`` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class BlockUsage:
    """Where the pool's slots (one token each) are; the terms are those of Kwon et al. 2023, Figure 2.

    ``total`` = ``held`` + ``reserved`` + ``internal_waste`` + ``external_waste`` + ``free``.
    """

    total: int
    held: int
    """Slots with the keys and values of a live sequence's token."""
    reserved: int
    """Empty slots that their sequence may still fill before it reaches its token limit."""
    internal_waste: int
    """Empty slots that their sequence can never fill."""
    external_waste: int
    """Slots that no sequence can use: of free runs that are too short, or lost to an allocator's rounding."""
    free: int
    """Slots that can be allocated; blocks kept for the prefix cache count as free."""


class BlockManager(ABC):
    """Hands out the pool's blocks. The only writer of ``block_table`` and ``num_computed_tokens``.

    A live request is one that was admitted and not freed since.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_queried_tokens = 0
        """Tokens of admitted requests that were looked up in the prefix cache."""
        self.num_hit_tokens = 0
        """Those that were found there."""
        self._live: dict[str, Request] = {}

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now."""

    @property
    def num_used_blocks(self) -> int:
        """Blocks that live requests hold."""
        return self.num_blocks - self.num_free_blocks

    @abstractmethod
    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of ``num_tokens`` tokens fits into an otherwise empty pool."""

    @abstractmethod
    def admit(self, request: Request, headroom: int) -> bool:
        """Give a waiting request blocks for all the tokens it has so far, or change nothing.

        Fills ``request.block_table`` and sets ``request.num_computed_tokens`` to the tokens whose
        keys and values are in those blocks already (a prefix-cache hit; otherwise 0).

        Args:
            headroom: blocks that must stay free after that.

        Returns:
            Whether the request was admitted.
        """

    @abstractmethod
    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens after the computed ones; if there is none, change nothing."""

    def commit(self, request: Request, num_tokens: int) -> None:
        """Count on it that the next step writes the keys and values of the next ``num_tokens`` tokens.

        Others may share their blocks at once, even in that step: each layer writes all that is new before
        it reads anything.
        """
        request.num_computed_tokens += num_tokens

    def roll_back(self, request: Request, num_tokens: int) -> None:
        """Take back what was committed after the first ``num_tokens`` tokens: the step didn't write it."""
        request.num_computed_tokens = num_tokens

    def forget_prefixes(self) -> None:  # noqa: B027  # where nothing is shared there is nothing to forget
        """Let nobody share what was computed until now."""

    @abstractmethod
    def free(self, request: Request) -> None:
        """Take a live request's blocks back and reset its table and computed tokens."""

    @abstractmethod
    def usage(self) -> BlockUsage:
        """Where the pool's slots are."""

    def stranded_blocks(self) -> list[int]:
        """Free blocks that no admission can use, because their run is too short; here: none."""
        return []

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is in exactly one place: free, cached or in use."""
        for request in self._live.values():
            capacity = len(request.block_table) * BLOCK_SIZE
            _require(request.num_computed_tokens <= capacity, f"{request.request_id} outgrew its table")
        usage = self.usage()
        parts = (usage.held, usage.reserved, usage.internal_waste, usage.external_waste, usage.free)
        _require(min(parts) >= 0 and sum(parts) == usage.total, f"slots don't add up: {usage}")

    def allocated_slots(self, request: Request) -> tuple[int, int, int]:
        """(held, reserved, internal waste) of one live request's own table, in this order."""
        capacity = len(request.block_table) * BLOCK_SIZE
        held = request.num_computed_tokens
        reserved = max(0, min(capacity, request.max_total_tokens) - held)
        return held, reserved, capacity - held - reserved

    def _release(self, request: Request) -> None:
        del self._live[request.request_id]
        request.block_table = array("i")
        request.num_computed_tokens = request.num_shareable_blocks = 0


class PagedBlockManager(BlockManager):
    """PagedAttention's allocation (Kwon et al. 2023, section 4): a block whenever a sequence crosses an edge.

    Blocks are counted by reference. A full block whose tokens are computed gets a key, the SHA-256
    of its tokens and of its parent's key, so that equal keys mean equal prefixes. When its last
    reference goes, the block stays *cached* under that key until it is the least recently used one
    and the space is needed.
    """

    def __init__(self, num_blocks: int, *, use_prefix_cache: bool) -> None:
        super().__init__(num_blocks)
        self.use_prefix_cache = use_prefix_cache
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack, lowest id on top
        self._cached: OrderedDict[int, None] = OrderedDict()  # no reference, but a key; oldest first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free) + len(self._cached)

    def can_ever_fit(self, num_tokens: int) -> bool:
        return blocks_for(num_tokens) <= self.num_blocks

    def admit(self, request: Request, headroom: int) -> bool:
        is_looked_up = self.use_prefix_cache and request.sampling.prompt_logprobs is None
        hits = self._find_prefix(request) if is_looked_up else []
        num_new = blocks_for(len(request.token_ids)) - len(hits)
        # Hit blocks that nobody uses are in _cached: taking them makes fewer blocks free, too.
        num_revived = sum(self._ref_counts[block] == 0 for block in hits)
        if num_new + num_revived + headroom > self.num_free_blocks:
            return False
        for block in hits:
            self._ref_counts[block] += 1
            self._cached.pop(block, None)
        request.block_table = array("i", hits + [self._allocate() for _ in range(num_new)])
        request.num_computed_tokens = len(hits) * BLOCK_SIZE
        request.num_shareable_blocks = len(hits)
        self._live[request.request_id] = request
        if is_looked_up:
            self.num_queried_tokens += len(request.token_ids)
            self.num_hit_tokens += request.num_computed_tokens
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        num_in_cache, num_blocks = request.num_computed_tokens + num_tokens, len(request.block_table)
        if num_in_cache <= num_blocks * BLOCK_SIZE:  # 15 of 16 decodes
            return True
        num_new = blocks_for(num_in_cache) - num_blocks
        if num_new > self.num_free_blocks:
            return False
        request.block_table.extend(self._allocate() for _ in range(num_new))
        return True

    def commit(self, request: Request, num_tokens: int) -> None:
        request.num_computed_tokens += num_tokens
        num_full = request.num_computed_tokens // BLOCK_SIZE
        if num_full == request.num_shareable_blocks or not self.use_prefix_cache:
            return
        if request.token_ids[num_full * BLOCK_SIZE - 1] == PENDING_TOKEN:
            num_full -= 1  # its last token isn't known yet: the next commit comes back to it
        for index in range(request.num_shareable_blocks, num_full):
            key = self._key(request, index)
            # Where another request has computed the same prefix before, this copy stays private.
            if key not in self._block_of:
                block = request.block_table[index]
                self._key_of[block] = key
                self._block_of[key] = block
        request.num_shareable_blocks = num_full

    def roll_back(self, request: Request, num_tokens: int) -> None:
        super().roll_back(request, num_tokens)
        num_full = num_tokens // BLOCK_SIZE
        for block in request.block_table[num_full : request.num_shareable_blocks]:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
        request.num_shareable_blocks = min(request.num_shareable_blocks, num_full)

    def forget_prefixes(self) -> None:
        self._free += self._cached
        for known in (self._cached, self._key_of, self._block_of):
            known.clear()

    def free(self, request: Request) -> None:
        # Last block first: when space is needed, a prefix's tail goes before its head.
        for block in reversed(request.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)
        self._release(request)

    def usage(self) -> BlockUsage:
        slots = [self.allocated_slots(request) for request in self._live.values()]
        # A block that several requests share is always full: count it once.
        num_counted_again = sum(count - 1 for count in self._ref_counts if count > 1)
        return BlockUsage(
            total=self.num_blocks * BLOCK_SIZE,
            held=sum(held for held, _, _ in slots) - num_counted_again * BLOCK_SIZE,
            reserved=sum(reserved for _, reserved, _ in slots),
            internal_waste=sum(internal for _, _, internal in slots),
            external_waste=0,  # any free block serves any request
            free=self.num_free_blocks * BLOCK_SIZE,
        )

    def check_integrity(self) -> None:
        super().check_integrity()
        in_use = Counter(block for request in self._live.values() for block in request.block_table)
        for request in self._live.values():
            _require(
                len(set(request.block_table)) == len(request.block_table), "a block is in one table twice"
            )
        counted = [in_use[block] for block in range(self.num_blocks)]
        _require(self._ref_counts == counted, "a reference count is not the number of tables with the block")
        everywhere = sorted([*self._free, *self._cached, *in_use])
        _require(everywhere == list(range(self.num_blocks)), "a block is lost, or in two places")
        _require(self._cached.keys() <= self._key_of.keys(), "a cached block has no key")
        _require(not set(self._free) & self._key_of.keys(), "a free block has a key")
        blocks_by_key = {block: key for key, block in self._block_of.items()}
        _require(self._key_of == blocks_by_key, "keys and blocks disagree")

    def _allocate(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._ref_counts[block] = 1
        return block

    def _find_prefix(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix that leaves at least one token to compute, for its logits."""
        hits: list[int] = []
        for index in range((len(request.token_ids) - 1) // BLOCK_SIZE):
            block = self._block_of.get(self._key(request, index))
            if block is None:
                break
            hits.append(block)
        return hits

    @staticmethod
    def _key(request: Request, index: int) -> bytes:
        """The chained key of the request's full block ``index``, computed once per request."""
        keys = request.block_hashes
        while len(keys) <= index:
            start = len(keys) * BLOCK_SIZE
            tokens = array("q", request.token_ids[start : start + BLOCK_SIZE])
            parent = keys[-1] if keys else b""
            keys.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return keys[index]


class ContiguousBlockManager(BlockManager):
    """Static allocation: one run of ``max_model_len`` tokens' consecutive blocks at admission, first fit.

    This is what engines without paging do (Kwon et al. 2023, section 3.1): nothing grows, nothing
    is shared, and whatever the sequence doesn't use is lost to the others until it ends.
    """

    def __init__(self, num_blocks: int, *, max_model_len: int) -> None:
        super().__init__(num_blocks)
        self.run_length = blocks_for(max_model_len)

    @property
    def num_free_blocks(self) -> int:
        return self.num_blocks - len(self._live) * self.run_length

    def can_ever_fit(self, num_tokens: int) -> bool:
        return blocks_for(num_tokens) <= self.run_length <= self.num_blocks

    def admit(self, request: Request, headroom: int) -> bool:
        # No headroom is needed: a run is all that its sequence can ever use.
        start = self._first_fit()
        if start is None:
            return False
        request.block_table = array("i", range(start, start + self.run_length))
        request.num_computed_tokens = 0
        self._live[request.request_id] = request
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        return request.num_computed_tokens + num_tokens <= len(request.block_table) * BLOCK_SIZE

    def free(self, request: Request) -> None:
        self._release(request)

    def usage(self) -> BlockUsage:
        slots = [self.allocated_slots(request) for request in self._live.values()]
        too_short = len(self.stranded_blocks())
        return BlockUsage(
            total=self.num_blocks * BLOCK_SIZE,
            held=sum(held for held, _, _ in slots),
            reserved=sum(reserved for _, reserved, _ in slots),
            internal_waste=sum(internal for _, _, internal in slots),
            external_waste=too_short * BLOCK_SIZE,
            free=(self.num_free_blocks - too_short) * BLOCK_SIZE,
        )

    def stranded_blocks(self) -> list[int]:
        gaps = self._gaps()
        return [block for start, end in gaps for block in range(end - (end - start) % self.run_length, end)]

    def check_integrity(self) -> None:
        super().check_integrity()
        in_use = [block for request in self._live.values() for block in request.block_table]
        _require(len(set(in_use)) == len(in_use), "a block is in two runs")
        _require(all(0 <= block < self.num_blocks for block in in_use), "a run leaves the pool")
        for request in self._live.values():
            start = request.block_table[0]
            run = array("i", range(start, start + self.run_length))
            _require(request.block_table == run, f"{request.request_id}'s run is broken")
        _require(len(in_use) + self.num_free_blocks == self.num_blocks, "a block is lost")

    def _gaps(self) -> list[tuple[int, int]]:
        """(start, end) of the free runs, in order."""
        starts = sorted(request.block_table[0] for request in self._live.values())
        ends = [0, *(start + self.run_length for start in starts)]
        return [
            (end, start) for end, start in zip(ends, [*starts, self.num_blocks], strict=True) if end < start
        ]

    def _first_fit(self) -> int | None:
        return next((start for start, end in self._gaps() if end - start >= self.run_length), None)


def _require(condition: bool, message: str) -> None:
    # Not an assert statement: the check must also hold under `python -O`.
    if not condition:
        raise AssertionError(message)
