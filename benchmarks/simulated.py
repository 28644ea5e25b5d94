"""Simulated figures beside published ones: what the simulator is worth without calibration.

    python benchmarks/simulated.py [--output benchmarks/results/simulated.json]

Nothing is measured here, and nothing was fitted to what is published: rates are the makers' figures times the
shares in minivllm_bench/simulator/cost_model.py. docs/simulator.md says why the two differ where they do. The
same figures come out on every machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks" / "src")]

from minivllm.config import EngineConfig  # noqa: E402
from minivllm_bench.load import arrival_times  # noqa: E402
from minivllm_bench.memory_trace import ALLOCATIONS  # noqa: E402
from minivllm_bench.records import RequestRecord  # noqa: E402
from minivllm_bench.simulator.cost_model import Rates  # noqa: E402
from minivllm_bench.simulator.deployment import Deployment  # noqa: E402
from minivllm_bench.simulator.devices import find_device  # noqa: E402
from minivllm_bench.simulator.measure import run_users  # noqa: E402
from minivllm_bench.simulator.models import find_model  # noqa: E402
from minivllm_bench.simulator.simulation import Simulation  # noqa: E402
from minivllm_bench.workloads import WORKLOADS, Workload, fixed, sharegpt_like  # noqa: E402

SEED = 0
OPT_KV_MEMORY = 12 * 2**30  # 15.7K slots: Kwon et al. 2023, Table 1
OPT_RATES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
OPT_SECONDS = 600.0
SUSTAINED_LATENCY = 0.2
"""Seconds per token, normalised: a rate at which it is more isn't sustained. Where latency explodes, it
hardly matters at which value one cuts."""
PAPER = {  # section 6.2 and Figure 13a
    "paged": {"sequences at 2 requests/s": 30.42},
    "orca-oracle": {"sequences at 2 requests/s": 13.62, "vLLM sustains": "1.7 to 2.7 times the rate"},
    "orca-pow2": {"sequences at 2 requests/s": 9.81},
    "orca-max": {"sequences at 2 requests/s": 7.00, "vLLM sustains": "2.7 to 8 times the rate"},
}


def deploy(model: str, device: str, **settings: Any) -> Deployment:
    shape, gpu = find_model(model), find_device(device)
    return Deployment(
        model=shape, device=gpu, rates=Rates.of_device(gpu, shape), config=EngineConfig(seed=SEED, **settings)
    )


def offline(
    deployment: Deployment, workload: Workload, num_requests: int
) -> tuple[float, list[RequestRecord]]:
    """Seconds that so many requests take that all come at once, and what became of them."""
    engine, clock = deployment.engine()
    sessions = itertools.islice(workload(random.Random(SEED)), num_requests)
    simulation = Simulation(engine, clock, users=num_requests, sessions=sessions)
    records = simulation.run()
    engine.check_integrity()
    return simulation.seconds, records


def small_cases() -> Iterable[dict[str, Any]]:
    """One figure each."""
    seconds, _ = offline(deploy("llama-2-7b", "a10g", max_model_len=4096), fixed(256, 128), 1000)
    yield {
        "what": "Llama-2-7B on an A10G, 1,000 requests at once, 256 tokens in and 128 out: requests/s",
        "published": 3.84,
        "source": "vLLM 0.2.0, github.com/neuralmagic/nm-vllm, benchmark results of commit a55fb2b",
        "simulated": 1000 / seconds,
    }
    seconds, _ = offline(deploy("llama-3.1-8b", "a100-40gb", max_model_len=4096), fixed(1024, 128), 1)
    yield {
        "what": "Llama-3.1-8B on an A100-40GB, one request, 1,024 tokens in and 128 out: tokens/s",
        "published": 75,
        "source": "vLLM 0.23, johnmusgrave.com/p/vllm-throughput-latency-sweep-on (of decode alone)",
        "simulated": 127 / (seconds - _first_token(deploy("llama-3.1-8b", "a100-40gb", max_model_len=4096))),
    }
    for device, published, source in (
        ("h100", 997.5, "buildkite.com/elastic/enterprise-search-ruby/builds/571"),
        ("h200", 833.4, "buildkite.com/vllm/performance-benchmark/builds/9515"),
    ):
        seconds, _ = offline(deploy("llama-3.1-8b", device, max_model_len=4096), fixed(32, 128), 8)
        yield {
            "what": f"Llama-3.1-8B on an {device.upper()}, 8 requests, 32 tokens in and 128 out: ms for all",
            "published": published,
            "source": f"vLLM in autumn 2024, {source}",
            "simulated": 1000 * seconds,
        }
    for device, published, source in (
        ("h100", 19.50, "buildkite.com/elastic/enterprise-search-ruby/builds/571"),
        ("h200", 22.57, "buildkite.com/vllm/performance-benchmark/builds/9515"),
    ):
        workload = sharegpt_like(mean_prompt=215, mean_output=200, longest=2048)
        seconds, _ = offline(deploy("llama-3.1-8b", device, max_model_len=4096), workload, 200)
        yield {
            "what": f"Llama-3.1-8B on an {device.upper()}, 200 requests of ShareGPT at once: requests/s",
            "published": published,
            "source": f"vLLM in autumn 2024, {source}",
            "simulated": 200 / seconds,
        }


def _first_token(deployment: Deployment) -> float:
    _, records = offline(deployment, fixed(1024, 128), 1)
    first = records[0].first_token
    assert first is not None
    return first


def llama_on_a10g() -> Iterable[dict[str, Any]]:
    """1 and 50 users, in the four modes."""
    modes: dict[str, dict[str, Any]] = {
        "paged + continuous": {},
        "contiguous + continuous": {"kv_allocation": "contiguous"},
        "sequential, 4 slots": {"kv_allocation": "contiguous", "scheduler": "sequential", "num_parallel": 4},
        "sequential, 1 slot": {"kv_allocation": "contiguous", "scheduler": "sequential"},
    }
    for name, settings in modes.items():
        deployment = deploy("llama-3-8b", "a10g", max_model_len=4096, **settings)
        for users in (1, 50):
            point = run_users(deployment, WORKLOADS["memoryless"], users=users, seconds=120.0, seed=SEED)
            figures = point["figures"]
            assert figures is not None
            yield {
                "mode": name,
                "users": users,
                "tokens_per_second": figures["output_throughput"],
                "ttft_p50": figures["ttft"]["p50"],
                "itl_p50": figures["itl"]["p50"],
                "sequences_at_once": point["occupancy"] and point["occupancy"]["running_mean"],
            }


def opt_rate(allocation: str, rate: float) -> dict[str, Any]:
    """OPT-13B on an A100-40GB at one rate of ShareGPT's requests."""
    deployment = deploy(
        "opt-13b",
        "a100-40gb",
        max_model_len=2048,
        kv_cache_memory=OPT_KV_MEMORY,
        gpu_memory_utilization=0.95,
    )
    num_blocks, max_model_len = deployment.ledger().num_blocks, 2048
    engine, clock = deployment.engine(ALLOCATIONS[allocation](num_blocks, max_model_len))
    times = arrival_times(rate, 1.0, random.Random(f"{SEED}/arrivals"))
    # Twice as many as come on average: far more than come.
    sessions = list(itertools.islice(WORKLOADS["sharegpt"](random.Random(SEED)), int(2 * rate * OPT_SECONDS)))
    simulation = Simulation(engine, clock, arrivals=zip(times, sessions, strict=False))
    records = simulation.run(OPT_SECONDS)
    engine.check_integrity()
    # A request that hasn't ended has waited so long at least: without it, overload would look well.
    latencies = [
        ((OPT_SECONDS if record.finished is None else record.finished) - record.sent)
        / sessions[record.session].turns[0].output_tokens
        for record in records
    ]
    return {
        "allocation": allocation,
        "rate": rate,
        "normalised_latency": statistics.fmean(latencies),
        "ended_per_second": sum(record.is_complete for record in records) / OPT_SECONDS,
        "sequences_at_once": statistics.fmean(stats.num_running for _, stats in simulation.stats[60:]),
    }


def sustained(allocation: str) -> float:
    """The highest rate, to 0.05, whose normalised latency is below :data:`SUSTAINED_LATENCY`."""
    low, high = 0.0, 4.0
    while high - low > 0.05:
        middle = (low + high) / 2
        if opt_rate(allocation, middle)["normalised_latency"] < SUSTAINED_LATENCY:
            low = middle
        else:
            high = middle
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulated figures beside published ones.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write them to this JSON file, too")
    output: Path | None = parser.parse_args().output
    start = time.monotonic()
    report: dict[str, Any] = {"simulated": True, "seed": SEED}

    report["small cases"] = list(small_cases())
    for case in report["small cases"]:
        ratio = case["simulated"] / case["published"]
        print(
            f"{case['what']}\n    published {case['published']:.4g}, simulated {case['simulated']:.4g}, "
            f"{ratio:.2f} times"
        )

    report["llama-3-8b on a10g"] = list(llama_on_a10g())
    for row in report["llama-3-8b on a10g"]:
        print(f"{row['mode']:>24} {row['users']:>3} users {row['tokens_per_second']:8.1f} tokens/s")

    report["opt-13b on a100-40gb"] = rows = [
        opt_rate(allocation, rate) for allocation in PAPER for rate in OPT_RATES
    ]
    for row in rows:
        print(
            f"{row['allocation']:>12} {row['rate']:>4} requests/s: "
            f"{row['normalised_latency'] * 1e3:8.1f} ms a token, "
            f"{row['sequences_at_once']:6.2f} at once"
        )
    report["opt-13b sustained rates"] = {name: sustained(name) for name in PAPER}
    print(report["opt-13b sustained rates"])
    report["published by Kwon et al. 2023"] = PAPER
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
