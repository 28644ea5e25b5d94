"""How long a step takes: a roofline (Williams et al. 2009), part by part.

A step's matrix products either wait for their weights to come out of memory, or for the arithmetic units::

    layers      max(weight bytes / bandwidth, 2 x weights x tokens / flops)
    logits      max(head bytes / bandwidth, 2 x head weights x sampled tokens / flops)
    decodes     KV bytes of all their contexts / KV bandwidth
    prefill     KV bytes of the chunks' contexts / KV bandwidth
                + pairs of a query and a key x flops of each / attention flops
    besides     so much a step, and so much a sequence

These are sums, since the parts run one after the other. What :class:`Rates` has are rates that are achieved,
not those of a data sheet.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from minivllm.engine.scheduler import ScheduledBatch
from minivllm_bench.simulator.devices import Device
from minivllm_bench.simulator.models import ModelShape
from minivllm_bench.simulator.runner import StepCost
from minivllm_bench.simulator.work import StepWork

BANDWIDTH_SHARE = 0.8
"""Of a GPU's memory bandwidth that kernels which only stream weights or keys get: a copy that does nothing
else gets 0.83 of it on an A100 PCIe and on a Titan RTX (github.com/cissieAB/ifarm-gpus, docs/roofline.md)."""

FLOPS_SHARE = 0.7
"""Of the tensor cores' rate in large matrix products: 0.74 on an A100 (230 of 312 TFLOP/s,
github.com/mli/transformers-benchmarks), less on what has less power to spend."""

ATTENTION_FLOPS_SHARE = 0.5
"""In prefill: FlashAttention-2 gets 0.5 to 0.73 on an A100 (Dao 2023), without the masked half."""

KERNELS_PER_LAYER = 8
"""In a step: two norms, three matrix products, rope with the KV write, attention, the activation."""

KERNEL_GAP = 2e-6
"""Seconds between two kernels of a CUDA graph, in which the memory idles: an assumption, to be calibrated."""

HOST_STEP_SECONDS = 0.08e-3
HOST_SEQUENCE_SECONDS = 3.1e-6
"""What scheduling, building and taking in a step take: benchmarks/results/scheduler.json, at 1 and at 256
sequences. On a GPU it runs beside the step before, and only counts where it is slower."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device achieves."""

    bandwidth: float
    """Bytes of weights per second."""
    kv_bandwidth: float
    """Bytes of keys and values per second."""
    flops: float
    """Floating-point operations per second in matrix products with weights."""
    attention_flops: float
    """The same in the attention of prefill chunks."""
    step_seconds: float
    """That each step takes besides."""
    sequence_seconds: float = 0.0
    """That each sequence of a step takes besides."""
    host_step_seconds: float = 0.0
    host_sequence_seconds: float = 0.0
    """The same of the host, which a GPU doesn't wait for."""

    @classmethod
    def of_device(cls, device: Device, model: ModelShape) -> Rates:
        """What to expect of a GPU, by the makers' figures and what others have measured."""
        return cls(
            bandwidth=BANDWIDTH_SHARE * device.bandwidth,
            kv_bandwidth=BANDWIDTH_SHARE * device.bandwidth,
            flops=FLOPS_SHARE * device.flops,
            attention_flops=ATTENTION_FLOPS_SHARE * device.flops,
            step_seconds=KERNELS_PER_LAYER * model.config.num_layers * KERNEL_GAP,
            host_step_seconds=HOST_STEP_SECONDS,
            host_sequence_seconds=HOST_SEQUENCE_SECONDS,
        )

    def as_json(self) -> dict[str, float]:
        """By name, in bytes, operations and seconds."""
        return asdict(self)


class CostModel:
    """Seconds of a step of one model on one device.

    Args:
        model: its shape.
        rates: of the device.
        kv_itemsize: bytes of one number in the KV cache.
    """

    def __init__(self, model: ModelShape, rates: Rates, kv_itemsize: int) -> None:
        self.model = model
        self.rates = rates
        self._linear_floor = model.linear_bytes / rates.bandwidth
        self._linear_per_token = 2 * model.num_linear_params / rates.flops
        self._head_floor = model.head_bytes / rates.bandwidth
        self._head_per_token = 2 * model.num_head_params / rates.flops
        self._per_key = model.kv_bytes(kv_itemsize) / rates.kv_bandwidth
        self._per_pair = model.attention_flops / rates.attention_flops

    def __call__(self, batch: ScheduledBatch) -> StepCost:
        """Of what the scheduler has chosen."""
        return self.cost(StepWork.of_batch(batch))

    def cost(self, work: StepWork) -> StepCost:
        """Of any step that computes something."""
        rates = self.rates
        device = rates.step_seconds + rates.sequence_seconds * work.sequences
        device += max(self._linear_floor, self._linear_per_token * work.tokens)
        if work.sampled:
            device += max(self._head_floor, self._head_per_token * work.sampled)
        device += self._per_key * (work.decode_context + work.prefill_context)
        device += self._per_pair * work.prefill_pairs
        return StepCost(
            host=rates.host_step_seconds + rates.host_sequence_seconds * work.sequences, device=device
        )
