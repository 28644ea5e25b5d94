"""A runner that computes nothing: it knows how long each step takes, and lets virtual time pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from minivllm.engine.runner import PendingTokens
from minivllm.engine.scheduler import SampledToken, ScheduledBatch
from minivllm_bench.simulator.clock import VirtualClock

TOKEN_ID = 0
"""What every sequence says, always."""
_TOKEN = SampledToken(TOKEN_ID)  # one for all: whoever gets it only reads it


class StepCost(NamedTuple):
    """Seconds that a step takes."""

    host: float
    """Of the processor that schedules it and takes its tokens in."""
    device: float
    """Of the device that computes it."""


class SimulatedRunner:
    """Takes as long as a cost model says, by a virtual clock.

    As on a real device, a step begins when the one before it has ended. With ``runs_ahead`` the host works
    for the next step meanwhile, so that the slower of the two sets the pace; without, the times add up.

    Args:
        cost: what a step takes.
        clock: the engine's; it is advanced here.
        runs_ahead: as :class:`~minivllm.engine.runner.TorchRunner`'s: on a GPU, not on a CPU.
    """

    def __init__(
        self, cost: Callable[[ScheduledBatch], StepCost], clock: VirtualClock, *, runs_ahead: bool
    ) -> None:
        self.runs_ahead = runs_ahead
        self._cost = cost
        self._clock = clock
        self._device_is_free_at = clock.now

    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        """Begin the step as soon as the device is free; its tokens come when it is done."""
        cost = self._cost(batch)
        self._clock.advance(cost.host)
        self._device_is_free_at = done_at = max(self._clock.now, self._device_is_free_at) + cost.device

        def fetch() -> list[SampledToken | None]:
            self._clock.advance_to(done_at)
            return [_TOKEN if item.is_sampled else None for item in batch.requests]

        return fetch
