"""Allocation by reservation: the three Orca variants that Kwon et al. 2023 compare PagedAttention with.

At admission a sequence gets one run of consecutive blocks for all the tokens it might come to have, and keeps
it until it ends (sections 3.1 and 6.1). How many those are is a :data:`Reservation`; where the run lies is up
to a buddy allocator, as the paper assumes of Orca.

Slots without a token are of three kinds, defined by the paper's section 3.1:

reserved
    The sequence will fill it, but hasn't yet.
internal waste
    It was reserved for an answer that turns out shorter: nobody knows before the end.
external waste
    The allocator lost it, which is known before the sequence runs: what its chunk has beyond what was asked
    for, and free chunks that are too short for the next in line. Figure 2 adds "& others".

What differs from the paper: chunks are of whole 16-token blocks, because block tables and kernels are those
of the other allocations (the paper doesn't say what its unit is). And a reservation never goes beyond the
longest sequence that the model takes, even where doubling would (the paper doesn't say).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from minivllm.config import BLOCK_SIZE
from minivllm.engine.block_manager import BlockManager, BlockUsage, blocks_for
from minivllm.request import Request
from minivllm_bench.buddy import BuddyAllocator, next_power_of_two

Reservation = Callable[[int, int], int]
"""(tokens of the prompt, tokens of the answer as it will turn out) → tokens to reserve."""


def reserve_longest(max_model_len: int) -> Reservation:
    """Orca (Max): always as much as the longest sequence takes."""
    return lambda num_prompt, num_output: max_model_len


def reserve_power_of_two(max_model_len: int) -> Reservation:
    """Orca (Pow2): for the answer at most twice what it takes: 32 tokens where it will have 25."""
    return lambda num_prompt, num_output: min(num_prompt + next_power_of_two(num_output), max_model_len)


def reserve_exact(max_model_len: int) -> Reservation:
    """Orca (Oracle): just what it takes, as if the answer's length were known in advance."""
    return lambda num_prompt, num_output: num_prompt + num_output


RESERVATIONS: dict[str, Callable[[int], Reservation]] = {
    "orca-max": reserve_longest,
    "orca-pow2": reserve_power_of_two,
    "orca-oracle": reserve_exact,
}
"""By name; each takes the longest sequence's tokens."""


class ReservingBlockManager(BlockManager):
    """One run of a buddy allocator's blocks for each sequence, reserved at admission.

    A request's ``max_total_tokens`` has to be the length it ends with: the oracle knows it, the power of two
    is rounded up from it, and ``usage`` tells by it what was reserved in vain.

    Args:
        num_blocks: of the pool.
        max_model_len: the longest sequence; no reservation is for more tokens.
        reserve: how many tokens a sequence's run is for.
    """

    def __init__(self, num_blocks: int, *, max_model_len: int, reserve: Reservation) -> None:
        super().__init__(num_blocks)
        self.max_model_len = max_model_len
        self.reserve = reserve
        self._buddies = BuddyAllocator(num_blocks)
        self._asked_tokens: dict[str, int] = {}  # of each live request, by its id
        self._refused_blocks = 0  # what the next in line has asked for in vain

    @property
    def num_free_blocks(self) -> int:
        return sum(map(len, self._buddies.free_chunks()))

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether it fits if as much as possible is reserved for it: all variants take the same requests."""
        longest_chunk = 1 << self.num_blocks.bit_length() >> 1
        return num_tokens <= self.max_model_len and blocks_for(self.max_model_len) <= longest_chunk

    def admit(self, request: Request, headroom: int) -> bool:
        # No headroom is needed: a run is all that its sequence can ever use.
        num_prompt = request.num_prompt_tokens
        asked = self.reserve(num_prompt, request.max_total_tokens - num_prompt)
        chunk = self._buddies.allocate(blocks_for(asked))
        if chunk is None:
            self._refused_blocks = blocks_for(asked)
            return False
        self._refused_blocks = 0
        request.block_table = array("i", chunk)
        request.num_computed_tokens = 0
        self._asked_tokens[request.request_id] = asked
        self._live[request.request_id] = request
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        return request.num_computed_tokens + num_tokens <= self._asked_tokens[request.request_id]

    def free(self, request: Request) -> None:
        self._buddies.free(request.block_table[0])
        del self._asked_tokens[request.request_id]
        self._release(request)

    def allocated_slots(self, request: Request) -> tuple[int, int, int]:
        """As the base class has it; the table's slots beyond these were lost to the allocator's rounding."""
        held, asked = request.num_computed_tokens, self._asked_tokens[request.request_id]
        return held, request.max_total_tokens - held, asked - request.max_total_tokens

    def stranded_blocks(self) -> list[int]:
        """Blocks of the free chunks that are too short for the request that was refused last."""
        chunks = self._buddies.free_chunks()
        return [block for chunk in chunks if len(chunk) < self._refused_blocks for block in chunk]

    def usage(self) -> BlockUsage:
        slots = [self.allocated_slots(request) for request in self._live.values()]
        held, reserved, internal = (sum(kind) for kind in zip(*slots, strict=True)) if slots else (0, 0, 0)
        num_free, num_stranded = self.num_free_blocks, len(self.stranded_blocks())
        rounding = (self.num_blocks - num_free) * BLOCK_SIZE - held - reserved - internal
        return BlockUsage(
            total=self.num_blocks * BLOCK_SIZE,
            held=held,
            reserved=reserved,
            internal_waste=internal,
            external_waste=rounding + num_stranded * BLOCK_SIZE,
            free=(num_free - num_stranded) * BLOCK_SIZE,
        )

    def check_integrity(self) -> None:
        super().check_integrity()
        in_use = [block for request in self._live.values() for block in request.block_table]
        free = [block for chunk in self._buddies.free_chunks() for block in chunk]
        if sorted(in_use + free) != list(range(self.num_blocks)):
            raise AssertionError("a block is lost, or in two places")
        for request in self._live.values():
            table, asked = request.block_table, self._asked_tokens[request.request_id]
            if table != array("i", range(table[0], table[0] + next_power_of_two(blocks_for(asked)))):
                raise AssertionError(f"{request.request_id}'s run is broken")
