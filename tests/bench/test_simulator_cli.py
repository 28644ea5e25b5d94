"""``minivllm simulate``: its figures, its answers, and one clear line for what can't be."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from minivllm.cli import main
from minivllm.config import EngineConfig
from minivllm.tracing.writer import TraceWriter
from minivllm_bench.simulator import answers
from minivllm_bench.simulator.answers import Limits, gpus_for, largest, users_within
from minivllm_bench.simulator.cost_model import Rates
from minivllm_bench.simulator.deployment import Deployment
from minivllm_bench.simulator.devices import find_device
from minivllm_bench.simulator.measure import run_rate, run_users
from minivllm_bench.simulator.models import MODELS
from minivllm_bench.simulator.simulation import Simulation
from minivllm_bench.workloads import WORKLOADS, fixed

SHORT = ["--model", "llama-3.2-1b", "--device", "a10g", "--seconds", "5"]


def deployment(**settings: Any) -> Deployment:
    model, device = MODELS["llama-3.2-1b"], find_device("a10g")
    config = EngineConfig(**{"seed": 0, "max_model_len": 1024, "kv_cache_memory": 2**28, **settings})
    return Deployment(model=model, device=device, rates=Rates.of_device(device, model), config=config)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (
            ["--device", "h1000", "--model", "llama-3.1-8b"],
            1,
            "--device h1000 is not known (did you mean h100?); known are a10g",
        ),
        (["--model", "llama-3.1-8b"], 1, "give --device: one of a10g, "),
        (["--model", "llama-9b", "--device", "l4"], 1, "--model llama-9b is not known"),
        (["--model", "no/such/folder/x", "--device", "l4"], 1, "no/such/folder/x"),
        (["--model", "llama-3.1-70b", "--device", "a10g"], 1, "llama-3.1-70b on a10g: cuda has 0 B left"),
        (["--model", "llama-3.1-8b", "--device", "cpu"], 1, "--device cpu needs --calibrate"),
        ([*SHORT, "--calibrate", "no-such-file"], 1, "can't read no-such-file"),
        ([*SHORT, "--users", "1,x"], 1, "--users takes numbers from 1 on with commas, got '1,x'"),
        ([*SHORT, "--users", "0"], 1, "--users takes numbers from 1 on"),
        ([*SHORT, "--rate", "nan"], 1, "--rate takes numbers above 0"),
        ([*SHORT, "--rate", "-1"], 1, "--rate takes numbers above 0"),
        ([*SHORT, "--seconds", "0"], 2, "--seconds must be above 0, got 0"),
        ([*SHORT, "--goal-itl", "inf"], 2, "--goal-itl must be above 0"),
        ([*SHORT, "--workload", "poetry"], 1, "--workload must be one of"),
        ([*SHORT, "--max-model-len", "999999"], 1, "--max-model-len must be at most 131072"),
        ([*SHORT, "--kv-allocation", "stacked"], 2, "--kv-allocation"),
        ([*SHORT, "--user", "1"], 2, "did you mean --users?"),
        ([*SHORT, "--users", "1", "--output", "/no/such/folder/x.json"], 1, "can't write --output"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        given = main(["simulate", *flags])
    except SystemExit as exit:
        given = int(exit.code or 0)
    error = capsys.readouterr().err
    assert given == code
    assert says in error
    assert error.count("\n") == 1


def test_a_comparison_has_all_modes_and_says_what_paging_is_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "simulated.json"
    flags = ["--users", "1,30", "--compare", "--kv-cache-memory", "1GiB", "--output", str(output)]
    assert main(["simulate", *SHORT, *flags]) == 0
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    by_mode = {
        c["name"]: {p["users"]: p["figures"]["output_throughput"] for p in c["points"]}
        for c in report["contenders"]
    }
    assert list(by_mode) == ["paged", "contiguous", "sequential-4", "sequential-1"]
    one, many = [[by_mode[name][users] for name in by_mode] for users in (1, 30)]
    assert max(one) == pytest.approx(min(one), rel=0.02), "one user is served alike in all modes"
    assert many == sorted(many, reverse=True)
    assert many[0] > 2 * many[1] > 2.2 * many[2] > 4.4 * many[3]
    assert "8 sequences fit at once without it" in printed
    assert report["device"] == "a10g"
    assert report["simulated"] is True


def test_the_same_flags_print_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> list[str]:
        assert main(["simulate", *SHORT, "--users", "5", "--rate", "2", "--workload", "chat"]) == 0
        return capsys.readouterr().out.splitlines()[:-1]  # the last line is the time it took

    assert run() == run()


def test_a_preset_and_engine_flags_reach_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SHORT, "--users", "4", "--preset", "ollama", "--num-parallel", "2"]) == 0
    printed = capsys.readouterr().out
    assert "contiguous + sequential, 2 at once" in printed
    assert printed.splitlines()[-3].split()[-2] == "2.0"


def test_an_open_loop_has_the_servers_throughput_while_it_keeps_up_and_a_queue_when_it_does_not() -> None:
    keeps_up, drowns = (
        run_rate(deployment(), fixed(50, 20), rate=rate, burstiness=1.0, seconds=4.0, seed=1)
        for rate in (10.0, 3000.0)
    )
    assert keeps_up["summary"]["request_throughput"] == pytest.approx(10.0, rel=0.4)
    assert keeps_up["figures"]["ttft"]["p99"] < 0.1
    assert drowns["summary"]["request_throughput"] < 2500
    assert drowns["occupancy"] is not None
    assert drowns["occupancy"]["waiting_max"] > 1000
    assert drowns["figures"]["ttft"]["p50"] is None or drowns["figures"]["ttft"]["p50"] > 1


@pytest.mark.parametrize("most", [1, 7, 100])
def test_the_search_finds_the_largest(most: int) -> None:
    for true in range(most + 5):
        assert largest(lambda number, true=true: number <= true, most) == min(true, most)
        near = largest(lambda number, true=true: number <= true, most, precision=0.1)
        assert min(true, most) * 0.9 - 1 <= near <= min(true, most)


def test_how_many_users_is_the_edge_of_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PRECISION", 0.0)
    limits = Limits(ttft=0.2, itl=0.012)
    workload = WORKLOADS["memoryless"]
    users = users_within(limits, deployment(), workload, seconds=5.0, seed=0)
    assert users > 1
    for count, is_kept in ((users, True), (users + 1, False)):
        point = run_users(deployment(), workload, users=count, seconds=5.0, seed=0)
        assert point["figures"] is not None
        assert limits.are_kept_by(point["figures"]) is is_kept
    # Who queues for ever isn't served, though tokens come fast to those who are.
    sequential = deployment(scheduler="sequential", num_parallel=2)
    assert users_within(Limits(itl=1.0), sequential, workload, seconds=5.0, seed=0) < 200
    assert users_within(Limits(itl=1e-6), deployment(), workload, seconds=5.0, seed=0) == 0


def test_how_many_gpus_is_the_edge_of_the_limits() -> None:
    limits = Limits(ttft=0.1)
    options: dict[str, Any] = {"burstiness": 1.0, "seconds": 5.0, "seed": 0}
    workload = fixed(200, 50)
    gpus = gpus_for(100.0, limits, deployment(), workload, **options)
    assert gpus is not None
    assert gpus > 1
    for count, is_kept in ((gpus, True), (gpus - 1, False)):
        point = run_rate(deployment(), workload, rate=100.0 / count, **options)
        assert limits.are_kept_by(point["figures"]) is is_kept
    assert gpus_for(100.0, Limits(ttft=1e-6), deployment(), workload, **options) is None


def test_a_trace_that_was_written_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trace of a simulated engine, whose rates then come back."""
    trace = tmp_path / "trace.json"
    writer = TraceWriter(str(trace))
    engine, clock = deployment().engine(sinks=[writer])
    writer.begin(EngineConfig(), {}, origin=clock.now, runs_ahead=True)
    Simulation(engine, clock, users=12, sessions=WORKLOADS["memoryless"](random.Random(0))).run(10.0)
    writer.close()
    throughputs = []
    for flags in ([], ["--calibrate", str(trace)]):
        assert main(["simulate", *SHORT, "--users", "12", *flags]) == 0
        printed = capsys.readouterr().out
        throughputs += re.findall(r"^ +12 +([0-9.]+)", printed, flags=re.MULTILINE)
    assert "median error of a step 0." in printed
    assert float(throughputs[1]) == pytest.approx(float(throughputs[0]), rel=0.02)
