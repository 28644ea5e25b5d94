"""A model on a device, with the engine's settings: how much KV memory there is, and an engine to try it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from minivllm.config import EngineConfig
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.engine import Engine
from minivllm.engine.memory import MemoryLedger, device_memory, estimate_workspace, plan_memory
from minivllm.engine.startup import DEFAULT_BATCHED_TOKENS
from minivllm.engine.steps import Sink
from minivllm.errors import OutOfMemoryError
from minivllm.request import EngineInfo
from minivllm_bench.simulator.clock import VirtualClock
from minivllm_bench.simulator.cost_model import CostModel, Rates
from minivllm_bench.simulator.devices import CPU, Device
from minivllm_bench.simulator.models import ModelShape
from minivllm_bench.simulator.runner import SimulatedRunner

CONTEXT_BYTES = 512 * 2**20
"""Of a GPU's memory for CUDA itself, its libraries' workspaces and the kernels: an assumption."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What ``minivllm serve`` would start with, and how fast that would be."""

    model: ModelShape
    device: Device | None
    """None: this machine's CPU."""
    rates: Rates
    config: EngineConfig

    @property
    def device_name(self) -> str:
        """As ``--device`` says."""
        return CPU if self.device is None else self.device.name

    @property
    def kv_itemsize(self) -> int:
        """Bytes of a number in the KV cache."""
        return kv_itemsize(self.config, self.model, self.device)

    @property
    def max_num_batched_tokens(self) -> int:
        """Of a step."""
        kind = "cpu" if self.device is None else "cuda"
        return self.config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[kind]

    def ledger(self) -> MemoryLedger:
        """Where the memory goes, as the engine would plan it.

        What it would measure on a GPU is estimated, and its CUDA graphs are taken to need nothing.

        Raises:
            StartupError: it doesn't fit; says what would.
        """
        device = torch.device("cpu" if self.device is None else "cuda")
        weights = self.model.weight_bytes
        if self.device is None:
            free, total = device_memory(device)
            free -= weights
        else:
            total = self.device.memory
            free = total - CONTEXT_BYTES - weights
        try:
            ledger = self._plan(device, weights, free, total)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{self.model.name} on {self.device_name}: {error.message}") from None
        return replace(ledger, device=self.device_name)

    def _plan(self, device: torch.device, weights: int, free: int, total: int) -> MemoryLedger:
        return plan_memory(
            self.config,
            self.model.config,
            device=device,
            kv_dtype={1: torch.float8_e4m3fn, 2: torch.float16, 4: torch.float32}[self.kv_itemsize],
            weights=weights,
            workspace_for=partial(
                estimate_workspace, self.model.config, torch.bfloat16, self.config.max_num_seqs
            ),
            graphs=0,
            max_num_batched_tokens=self.max_num_batched_tokens,
            memory=(free, total),
        )

    def engine(
        self, block_manager: BlockManager | None = None, sinks: Sequence[Sink] = ()
    ) -> tuple[Engine, VirtualClock]:
        """The engine over a simulated runner, and the clock of both.

        Args:
            block_manager: an experiment's own, instead of the one that the settings name.
            sinks: get a record of each step.
        """
        clock = VirtualClock()
        ledger = self.ledger()
        engine = Engine(
            self.config,
            SimulatedRunner(
                CostModel(self.model, self.rates, self.kv_itemsize), clock, runs_ahead=self.device is not None
            ),
            EngineInfo(ledger.max_model_len, self.model.config.vocab_size),
            num_blocks=ledger.num_blocks,
            max_num_batched_tokens=self.max_num_batched_tokens,
            eos_token_ids=frozenset(),
            clock=clock,
            block_manager=block_manager,
            sinks=sinks,
        )
        return engine, clock


def kv_itemsize(config: EngineConfig, model: ModelShape, device: Device | None) -> int:
    """Bytes of a number in the KV cache, by the engine's own defaults."""
    if config.kv_cache_dtype == "auto":
        return 4 if device is None and model.linear_bits >= 16 else 2
    return {"float32": 4, "fp8": 1}.get(config.kv_cache_dtype, 2)
