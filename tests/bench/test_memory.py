"""``minivllm bench memory``: the claims about memory, which no machine can change, and the command."""

from __future__ import annotations

import json
import random
import sys
import xml.etree.ElementTree as ET
from itertools import islice
from pathlib import Path

import pytest

from minivllm import cli
from minivllm_bench.block_map import KINDS
from minivllm_bench.memory import MemoryConfig, table
from minivllm_bench.memory_bars import PUBLISHED, PUBLISHED_SEQUENCES
from minivllm_bench.memory_trace import ALLOCATIONS, MemoryFigures, measure
from minivllm_bench.workloads import WORKLOADS

ORCAS = ("orca-oracle", "orca-pow2", "orca-max")


@pytest.fixture(scope="module")
def figures() -> dict[str, MemoryFigures]:
    """What the command measures by default."""
    config = MemoryConfig()
    sessions = config.sessions()
    return {
        name: measure(
            make,
            sessions,
            users=config.users,
            num_blocks=config.num_blocks,
            max_model_len=config.max_model_len,
        )
        for name, make in ALLOCATIONS.items()
    }


def test_shares_add_up(figures: dict[str, MemoryFigures]) -> None:
    for found in figures.values():
        assert sum(found.shares.values()) == pytest.approx(1.0)
        assert min(found.shares.values()) >= 0.0
        assert 0.0 <= found.allocated_without_token <= 1.0
        assert found.waiting > 0.99, "memory is the limit"
        allocated = found.shares["tokens"] / (1 - found.allocated_without_token)
        assert found.shares["tokens"] <= allocated <= 1.0 - found.shares["free"] + 1e-9


def test_less_than_4_percent_of_paged_memory_is_without_a_token(figures: dict[str, MemoryFigures]) -> None:
    assert figures["paged"].allocated_without_token < 0.04
    assert figures["paged"].shares["tokens"] > 0.95
    assert figures["contiguous"].allocated_without_token > 0.6


def test_the_order_of_figure_2(figures: dict[str, MemoryFigures]) -> None:
    in_use = [figures[name].shares["tokens"] for name in ("paged", *ORCAS)]
    assert in_use == sorted(in_use, reverse=True)
    sequences = [figures[name].sequences for name in ("paged", *ORCAS)]
    assert sequences == sorted(sequences, reverse=True)
    assert in_use[0] > 2 * in_use[1], "PagedAttention more than doubles what even an oracle uses"


@pytest.mark.parametrize("name", ["paged", *ORCAS])
def test_what_holds_tokens_is_near_the_published_share(name: str, figures: dict[str, MemoryFigures]) -> None:
    assert figures[name].shares["tokens"] == pytest.approx(PUBLISHED[name]["tokens"], abs=0.07)
    assert figures[name].sequences == pytest.approx(PUBLISHED_SEQUENCES[name], rel=0.15)


def test_orca_max_is_what_contiguous_is(figures: dict[str, MemoryFigures]) -> None:
    """Seven runs of 128 blocks in 983, wherever they lie: the rest is too short for another."""
    orca, contiguous = figures["orca-max"], figures["contiguous"]
    assert orca.shares == contiguous.shares
    assert orca.sequences == contiguous.sequences == 7.0
    assert orca.shares["external"] == pytest.approx((983 - 7 * 128) / 983)
    assert orca.shares["external"] == pytest.approx(PUBLISHED["orca-max"]["external"], abs=0.001)


def test_only_paged_preempts_and_an_oracle_reserves_nothing_in_vain(
    figures: dict[str, MemoryFigures],
) -> None:
    assert figures["paged"].preemptions > 0
    assert [figures[name].preemptions for name in ("contiguous", *ORCAS)] == [0] * 4
    assert figures["orca-oracle"].shares["internal"] == 0.0
    assert figures["paged"].shares["external"] == 0.0


def test_the_published_shares_are_all_of_the_memory() -> None:
    for name in ORCAS:
        assert sum(PUBLISHED[name].values()) == pytest.approx(1.0, abs=0.0015), "each is rounded to 0.1%"


def test_the_default_pool_is_the_papers_table_1() -> None:
    assert MemoryConfig().num_blocks * 16 == 15_728  # "15.7K" slots


def test_a_light_load_is_told_from_a_heavy_one() -> None:
    sessions = list(islice(WORKLOADS["short-short"](random.Random(0)), 20))
    found = measure(ALLOCATIONS["paged"], sessions, users=2, num_blocks=100, max_model_len=64)
    assert found.waiting == 0.0
    assert found.shares["free"] > 0.8
    assert found.sequences == pytest.approx(2.0)
    assert "more --users" in table({"paged": found})[-1]


# Two sequences of the longest: 256 blocks of 16 tokens of 1 KiB.
SMALL = ["--users", "4", "--requests", "40", "--token-memory", "1KiB", "--kv-memory", "4MiB"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "one" / "deep", tmp_path / "two"]
    for folder in folders:
        assert cli.main(["bench", "memory", *SMALL, "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "256 blocks of 16 tokens = 4096 tokens" in out
    assert out.count("published") == 2 * 4
    report = json.loads((folders[0] / "memory.json").read_text())
    assert list(report["allocations"]) == list(ALLOCATIONS)
    for found in report["allocations"].values():
        shares = found["shares_of_kv_memory"]
        assert list(shares) == list(KINDS)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert f"{shares['tokens']:.1%}" in out
    for name in ("memory.svg", "block_map.svg"):
        text = (folders[0] / name).read_text()
        assert ET.fromstring(text).tag.endswith("svg")
        for allocation in ALLOCATIONS:
            assert allocation in text
    for name in ("memory.json", "memory.svg", "block_map.svg"):
        files = [folder / name for folder in folders]
        assert files[0].read_bytes() == files[1].read_bytes(), "the same seed makes the same files"


def test_sessions_of_several_turns(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "memory", *SMALL, "--workload", "chat"]) == 0
    assert "orca-oracle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--users", "0"], ["--users must be at least 1, got 0"]),
        (["--token-memory", "0"], ["--token-memory must be at least 1, got 0"]),
        (["--max-model-len", "-5"], ["--max-model-len must be at least 1, got -5"]),
        (["--requests", "100"], ["--requests must be at least 10 times --users, 640, got 100"]),
        (["--kv-memory", "1GiB"], ["--kv-memory must be at least 1677721600 (1.56 GiB)", "got 1073741824"]),
        (["--kv-memory", "lots"], ["--kv-memory", "lots", "64MB"]),
        (["--workload", "sharegtp"], ["--workload", "sharegtp", "sharegpt"]),
        (["--max-model-len", "1024"], ["--max-model-len must be at least 2048", "sharegpt", "got 1024"]),
        (["--uesrs", "3"], ["--uesrs; did you mean --users?"]),
        (["--output", "/dev/null/x"], ["--output /dev/null/x is no folder"]),
    ],
)
def test_bad_input_is_one_line_and_a_code(
    argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:  # as the installed command ends
        sys.exit(cli.main(["bench", "memory", *argv]))
    assert e.value.code in (1, 2)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert captured.out == ""
    for part in parts:
        assert part in lines[0]


def test_every_flag_has_its_default_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(["bench", "memory", "--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    for flag in (
        "--workload",
        "--users",
        "--requests",
        "--max-model-len",
        "--kv-memory",
        "--seed",
        "--output",
    ):
        assert flag in out
    assert out.count("default:") == 8
