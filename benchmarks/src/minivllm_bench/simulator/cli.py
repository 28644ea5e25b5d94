"""``minivllm simulate``: what a model on a device would do under load."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minivllm.config import EngineConfig, flag, option
from minivllm.engine.memory import MemoryLedger
from minivllm.errors import ConfigError
from minivllm.flags import Parser
from minivllm.tracing.reader import TraceReader
from minivllm_bench.compare_config import MODES
from minivllm_bench.jsonl import find_workload
from minivllm_bench.results import Point
from minivllm_bench.simulator import tables
from minivllm_bench.simulator.answers import Limits, gpus_for, users_within, worth_of_paging
from minivllm_bench.simulator.calibrate import Calibration, calibrate, samples_of
from minivllm_bench.simulator.cost_model import Rates
from minivllm_bench.simulator.deployment import Deployment, kv_itemsize
from minivllm_bench.simulator.devices import CPU, DEVICES, find_device
from minivllm_bench.simulator.measure import RatePoint, run_rate, run_users
from minivllm_bench.simulator.models import MODELS, find_model
from minivllm_bench.workloads import WORKLOADS, Workload

DEFAULT_MAX_MODEL_LEN = 4096
ENGINE_FLAGS = (
    "kv_cache_dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory",
    "gpu_memory_utilization",
    "kv_allocation",
    "scheduler",
    "num_parallel",
    "enable_prefix_caching",
)


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """What is simulated. Raises :class:`ConfigError` for impossible values."""

    model: str | None = option(
        None,
        f"{', '.join(MODELS)}; or as of minivllm serve, of which the configuration is enough "
        "(default: the embedded model)",
    )
    device: str | None = option(None, f"{', '.join(DEVICES)}; or cpu, with --calibrate")
    weight_bits: float | None = option(
        None, "per weight of the layers, scales included, such as 4.5 (default: 16, or the file's own)"
    )
    calibrate: str | None = option(
        None, "a trace that minivllm serve --trace has written: the device's rates are fitted to its steps"
    )
    users: str | None = option(
        None, "closed loop: users at once, with commas, such as 1,50 (default: 1,8,50, if there is no --rate)"
    )
    rate: str | None = option(None, "open loop: sessions that begin in a second, with commas, such as 0.5,2")
    burstiness: float = option(1.0, "of the open loop: 1 is a Poisson process, below 1 are bursts")
    workload: str = option("memoryless", f"{', '.join(WORKLOADS)}, or a .jsonl file")
    seconds: float = option(120.0, "of simulated time for which each run is looked at, after a warm-up")
    seed: int = option(0, "of lengths and arrival times")
    compare: bool = option(False, "all four modes of minivllm bench compare, and what paging is worth")
    goal_ttft: float | None = option(
        None, "milliseconds: the 99th percentile of the time to first token must keep it"
    )
    goal_itl: float | None = option(
        None,
        "milliseconds: the 99th percentile of the time between tokens must keep it; with one of these goals: "
        "how many users can be served, or how many GPUs each --rate takes",
    )
    output: str | None = option(None, "a JSON file for all figures (default: none)")

    def __post_init__(self) -> None:
        for name in ("weight_bits", "burstiness", "seconds", "goal_ttft", "goal_itl"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{flag(name)} must be above 0, got {value:g}")

    @property
    def user_counts(self) -> list[int]:
        """In order."""
        users = "1,8,50" if self.users is None and self.rate is None else self.users
        return _numbers("users", users, int, 1)

    @property
    def rates(self) -> list[float]:
        """In order."""
        return _numbers("rate", self.rate, float, 0)

    @property
    def limits(self) -> Limits | None:
        """The goals in seconds; None where there are none."""
        ttft, itl = (None if ms is None else ms / 1e3 for ms in (self.goal_ttft, self.goal_itl))
        return None if ttft is None and itl is None else Limits(ttft, itl)


def _numbers(name: str, text: str | None, kind: Callable[[str], Any], least: float) -> list[Any]:
    if text is None:
        return []
    try:
        numbers = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    is_good = numbers and all(least <= number < float("inf") and number > 0 for number in numbers)
    if not is_good:
        bound = "from 1 on" if least else "above 0"
        raise ConfigError(f"{flag(name)} takes numbers {bound} with commas, got {text!r}")
    return numbers


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code."""
    start = time.monotonic()
    parser = Parser("minivllm simulate", "What a model on a device would do under load: no GPU is needed.")
    parser.add_config(SimulateConfig, "what is simulated")
    parser.add_config(EngineConfig, "engine", only=ENGINE_FLAGS)
    parser.add_preset()
    parsed = parser.parse(argv)
    config = parser.make_config(SimulateConfig, parsed)
    workload, _ = find_workload(config.workload)
    user_counts, rates, limits = config.user_counts, config.rates, config.limits
    deployments = dict(_modes(parser, parsed, config))
    first, calibration = next(iter(deployments.values()))
    ledger = first.ledger()
    print("\n".join(_head(first, ledger, calibration)))

    report: dict[str, Any] = {
        "simulated": True,
        "settings": asdict(config),
        "model": first.model.name,
        "device": first.device_name,
        "memory": asdict(ledger),
        "rates_of_device": first.rates.as_json(),
        "calibration": None if calibration is None else asdict(calibration),
        "contenders": [],
        "answers": [],
    }
    simulated = 0.0
    points: dict[str, list[Point]] = {}
    for name, (deployment, _) in deployments.items():
        label = MODES[name].label if name in MODES else _label(deployment.config)
        print(f"\n{label}")
        points[name] = list(_run_users(deployment, workload, config, user_counts))
        rate_points = list(_run_rates(deployment, workload, config, rates))
        simulated += config.seconds * (len(points[name]) + len(rate_points))
        report["contenders"].append(
            {"name": name, "label": label, "points": points[name], "rates": rate_points}
        )
        if limits is not None:
            for answer in _answer(limits, deployment, workload, config, rates):
                print(answer["text"])
                report["answers"].append({"mode": name, **answer})
    if config.compare:
        print()
        for paged, contiguous in zip(points["paged"], points["contiguous"], strict=True):
            text = worth_of_paging(first, paged, contiguous)
            if text is not None:
                print(text)
                report["answers"].append({"mode": "paged", "users": paged["users"], "text": text})
    elapsed = time.monotonic() - start
    print(f"\n{elapsed:.1f} s")
    if config.output is not None:
        _write(Path(config.output), report)
    return 0


def _modes(
    parser: Parser, parsed: argparse.Namespace, config: SimulateConfig
) -> Iterator[tuple[str, tuple[Deployment, Calibration | None]]]:
    """The deployment, as its flags say, or in each mode of a comparison."""
    model = find_model(config.model)
    if config.device is None:
        raise ConfigError(f"give --device: one of {', '.join(DEVICES)}, or cpu with --calibrate")
    device = None if config.device.lower() == CPU else find_device(config.device)
    if device is None and config.calibrate is None:
        raise ConfigError("--device cpu needs --calibrate: how fast a CPU is can only be measured")
    if device is None and model.linear_bits == 16:
        model = replace(model, linear_bits=32.0, head_bits=32.0)  # what the engine makes of them there
    if config.weight_bits is not None:
        model = replace(model, linear_bits=config.weight_bits)
    given = {name: value for name, value in vars(parsed).items() if name in (*ENGINE_FLAGS, "preset")}
    given.setdefault("max_model_len", min(DEFAULT_MAX_MODEL_LEN, model.config.max_position_embeddings))
    modes = {name: vars(parser.parse(list(mode.flags))) for name, mode in MODES.items()}
    if not config.compare:
        modes = {"given": {}}
    rates, calibration = None, None
    for name, flags in modes.items():
        engine_config = parser.make_config(EngineConfig, argparse.Namespace(**{**given, **flags}))
        if rates is None:
            if config.calibrate is not None:
                samples = samples_of(TraceReader(config.calibrate))
                calibration = calibrate(samples, model, kv_itemsize(engine_config, model, device))
                rates = calibration.rates
            else:
                assert device is not None
                rates = Rates.of_device(device, model)
        deployment = Deployment(model=model, device=device, rates=rates, config=engine_config)
        yield name, (deployment, calibration)


def _label(config: EngineConfig) -> str:
    slots = "" if config.scheduler == "continuous" else f", {config.num_slots} at once"
    return f"{config.kv_allocation} + {config.scheduler}{slots}"


def _head(deployment: Deployment, ledger: MemoryLedger, calibration: Calibration | None) -> list[str]:
    rates = deployment.rates
    lines = [
        f"{deployment.model.name} on {deployment.device_name}, simulated",
        *ledger.lines(),
        f"rates: weights {rates.bandwidth / 1e9:.4g} GB/s, KV {rates.kv_bandwidth / 1e9:.4g} GB/s, products "
        f"{rates.flops / 1e12:.4g} TFLOP/s, attention {rates.attention_flops / 1e12:.4g} TFLOP/s, "
        f"{rates.step_seconds * 1e3:.3g} ms a step besides",
    ]
    if calibration is not None:
        lines.append(
            f"fitted to {calibration.num_steps} measured steps, {calibration.num_left_out} of them left out; "
            f"median error of a step {calibration.median_error:.1%}"
        )
    return lines


def _run_users(
    deployment: Deployment, workload: Workload, config: SimulateConfig, counts: list[int]
) -> Iterator[Point]:
    if counts:
        print(tables.USERS_HEAD)
    for users in counts:
        point = run_users(deployment, workload, users=users, seconds=config.seconds, seed=config.seed)
        print(tables.users_row(point), flush=True)
        yield point


def _run_rates(
    deployment: Deployment, workload: Workload, config: SimulateConfig, rates: list[float]
) -> Iterator[RatePoint]:
    if rates:
        print(tables.RATES_HEAD)
    for rate in rates:
        point = run_rate(
            deployment,
            workload,
            rate=rate,
            burstiness=config.burstiness,
            seconds=config.seconds,
            seed=config.seed,
        )
        print(tables.rate_row(point), flush=True)
        yield point


def _answer(
    limits: Limits, deployment: Deployment, workload: Workload, config: SimulateConfig, rates: list[float]
) -> Iterator[dict[str, Any]]:
    if not rates:
        users = users_within(limits, deployment, workload, seconds=config.seconds, seed=config.seed)
        yield {"limits": str(limits), "users": users, "text": f"{limits}: up to {users} users"}
    for rate in rates:
        gpus = gpus_for(
            rate,
            limits,
            deployment,
            workload,
            burstiness=config.burstiness,
            seconds=config.seconds,
            seed=config.seed,
        )
        count = "not even 1024 are enough" if gpus is None else str(gpus)
        text = f"{limits} at {rate:g} sessions/s: GPUs needed: {count}"
        yield {"limits": str(limits), "rate": rate, "gpus": gpus, "text": text}


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"can't write --output {path}: {error.strerror}") from None
    print(f"written to {path}", file=sys.stderr)
