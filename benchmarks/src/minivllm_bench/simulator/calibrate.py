"""Fits a device's rates to steps that were measured.

For a given balance of a device, flops / bandwidth, each part of a step is on a known side of its roof, and
a step's time is linear in the other unknowns: 1 / bandwidth, 1 / KV bandwidth, 1 / attention flops and the
seconds besides. So the balance is searched on a grid, and the rest is least squares without negative
results, of relative errors: a step of 5 ms counts as much as one of 500. Steps that took far longer than
the fit says, because something else ran on the machine, are left out of a second fit.

Where all prompts are alike, nobody can tell the products of a prefill from its attention. So the second fit
leans towards attention's work taking twice as long as other work, the more so the noisier the times are.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minivllm.engine.steps import StepRecord
from minivllm.errors import ConfigError
from minivllm_bench.simulator.cost_model import CostModel, Rates
from minivllm_bench.simulator.models import ModelShape
from minivllm_bench.simulator.work import StepWork

LEAST_STEPS = 20
_BALANCES = np.geomspace(0.1, 3000.0, 60)  # operations per byte; in 16 bits an H100 has 295
_OUTLIER = 4.0  # times the median error
_LEANING = 0.25  # how strongly, in errors of the first fit
_SLOWER = 2.0  # attention's bytes and operations than those of matrix products

Array = npt.NDArray[np.float64]


class Sample(NamedTuple):
    """One step that was measured."""

    work: StepWork
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Rates, and how well they say what they were fitted to."""

    rates: Rates
    num_steps: int
    num_left_out: int
    """Of them, because they took far longer than all others like them."""
    median_error: float
    """Of the steps' times, relative."""


def samples_of(records: Iterable[StepRecord]) -> list[Sample]:
    """Steps as the engine's sinks get them, or a trace has them. Failed ones, and empty ones, are left out.

    A step of a runner that runs ahead takes from the end of the one before it to its own, any other from its
    beginning to its end.
    """
    samples = []
    last_tokens = float("-inf")
    for record in records:
        if record.error is None and (record.decodes or record.prefills):
            ran_ahead = record.schedule_time < last_tokens
            seconds = (
                record.tokens_time - record.device_start
                if ran_ahead
                else record.end_time - record.schedule_time
            )
            samples.append(Sample(StepWork.of_record(record), seconds))
        last_tokens = record.tokens_time
    return samples


def calibrate(samples: Sequence[Sample], model: ModelShape, kv_itemsize: int) -> Calibration:
    """The rates that say best how long the steps took.

    Raises:
        ConfigError: too few steps, or only decodes, or only prefills.
    """
    if len(samples) < LEAST_STEPS:
        raise ConfigError(f"--calibrate needs at least {LEAST_STEPS} steps, got {len(samples)}")
    if not any(work.prefill_pairs for work, _ in samples) or not any(
        work.decode_context for work, _ in samples
    ):
        raise ConfigError("--calibrate needs a run with prompts and with answers of several tokens")
    first = _fit(samples, model, kv_itemsize, leaning=0.0)
    cost = CostModel(model, first, kv_itemsize)
    errors = [seconds / cost.cost(work).device - 1 for work, seconds in samples]
    limit = max(_OUTLIER * statistics.median(map(abs, errors)), 0.02)
    kept = [sample for sample, error in zip(samples, errors, strict=True) if error <= limit]
    noise = math.sqrt(statistics.fmean(error**2 for error in errors if error <= limit))
    rates = _fit(kept, model, kv_itemsize, leaning=_LEANING * noise)
    cost = CostModel(model, rates, kv_itemsize)
    return Calibration(
        rates=rates,
        num_steps=len(samples),
        num_left_out=len(samples) - len(kept),
        median_error=statistics.median(
            abs(cost.cost(work).device / seconds - 1) for work, seconds in samples
        ),
    )


def _fit(samples: Sequence[Sample], model: ModelShape, kv_itemsize: int, *, leaning: float) -> Rates:
    works = np.array([sample.work for sample in samples], dtype=np.float64)
    seconds = np.array([sample.seconds for sample in samples])
    sequences, tokens, sampled, decode_context, prefill_context, pairs = works.T
    kv = (decode_context + prefill_context) * model.kv_bytes(kv_itemsize)
    others = [kv, pairs * model.attention_flops, np.ones_like(seconds), sequences]

    longest_byte = float((seconds / model.linear_bytes).min())  # no byte takes longer than that

    def at(balance: float) -> tuple[float, float, Array]:
        linear = np.maximum(model.linear_bytes, 2 * model.num_linear_params * tokens / balance)
        head = np.maximum(model.head_bytes, 2 * model.num_head_params * sampled / balance) * (sampled > 0)
        features = np.stack([linear + head, *others], axis=1) / seconds[:, None]
        weight = leaning * np.sqrt(len(seconds)) / longest_byte
        leanings = weight * np.array([[-_SLOWER, 1, 0, 0, 0], [-_SLOWER, 0, balance, 0, 0]])
        targets = np.concatenate([np.ones_like(seconds), np.zeros(2)])
        solution, error = _non_negative_least_squares(np.concatenate([features, leanings]), targets)
        return error, balance, solution

    _, coarse, _ = min(map(at, _BALANCES.tolist()), key=lambda found: found[0])
    step = float(_BALANCES[1] / _BALANCES[0])
    finer = np.geomspace(coarse / step, coarse * step, 60)
    _, balance, solution = min(map(at, finer.tolist()), key=lambda found: found[0])
    weight, kv_byte, pair, step, sequence = solution.tolist()
    bandwidth = _rate(weight)
    return Rates(
        bandwidth=bandwidth,
        flops=bandwidth * balance,
        kv_bandwidth=_rate(kv_byte),
        attention_flops=_rate(pair),
        step_seconds=step,
        sequence_seconds=sequence,
    )


def _rate(seconds_each: float) -> float:
    """A part that takes no time that could be measured has no limit."""
    return 1 / seconds_each if seconds_each > 0 else 1e30


def _non_negative_least_squares(features: Array, targets: Array) -> tuple[Array, float]:
    """x >= 0 with ``features @ x`` as near to ``targets`` as can be, and the sum of squared errors.

    With five unknowns, all 31 sets of those that aren't 0 can be tried.
    """
    scale = np.sqrt((features**2).sum(axis=0))
    scale[scale == 0] = 1.0
    scaled = features / scale
    gram, target = scaled.T @ scaled, scaled.T @ targets
    total = float(targets @ targets)
    best, best_error = np.zeros(len(scale)), total
    for size in range(1, len(scale) + 1):
        for chosen in map(list, itertools.combinations(range(len(scale)), size)):
            try:
                part = np.linalg.solve(gram[np.ix_(chosen, chosen)], target[chosen])
            except np.linalg.LinAlgError:
                continue
            if (part < 0).any():
                continue
            error = total - float(target[chosen] @ part)
            if error < best_error:
                best, best_error = np.zeros(len(scale)), error
                best[chosen] = part
    return best / scale, best_error
