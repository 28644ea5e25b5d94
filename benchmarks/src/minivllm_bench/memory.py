"""``minivllm bench memory``: which share of the KV memory holds tokens, for each way to allocate it.

Kwon et al. 2023, Figure 2, measured again: the engine's scheduler serves the same requests over paged and
contiguous allocation and over the paper's three Orca variants (``reservation.py``), with more users than
memory. The defaults are the paper's: OPT-13B (800 KiB of keys and values per token) and 12 GiB (Table 1).

Needs no model, no GPU and no server: no token is computed, and the figures are the same on every machine.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from minivllm.config import BLOCK_SIZE, format_size, option
from minivllm.engine.block_manager import blocks_for
from minivllm.errors import ConfigError
from minivllm.flags import Parser
from minivllm_bench import block_map, memory_bars
from minivllm_bench.block_map import KINDS
from minivllm_bench.memory_bars import PUBLISHED, PUBLISHED_SEQUENCES
from minivllm_bench.memory_trace import ALLOCATIONS, MIDDLE, MemoryFigures, measure
from minivllm_bench.workloads import WORKLOADS, Session


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What to serve, and in how much memory. Raises :class:`ConfigError` for what can't be measured."""

    workload: str = option("sharegpt", "what users ask for", choices=tuple(WORKLOADS))
    users: int = option(64, "users in a closed loop: more than fit at once, so that memory is the limit")
    requests: int = option(1000, "requests in all, at least 10 for each user; a session is never cut")
    max_model_len: int = option(2048, "most tokens in a sequence, prompt and answer")
    kv_memory: int = option(12 * 2**30, "memory for keys and values, such as 12GiB", is_size=True)
    token_memory: int = option(
        800 * 2**10, "what one token's keys and values take in all layers, such as 800KiB", is_size=True
    )
    seed: int = option(0, "of the workload's lengths")
    output: str | None = option(
        None, "folder for memory.json, memory.svg and block_map.svg (default: none, the table alone)"
    )

    def __post_init__(self) -> None:
        for name in ("users", "max_model_len", "token_memory"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.requests < 10 * self.users:
            raise ConfigError(
                f"--requests must be at least 10 times --users, {10 * self.users}, got {self.requests}: "
                "the load would not be steady for long enough"
            )
        longest_chunk = 1 << self.num_blocks.bit_length() >> 1
        if longest_chunk < blocks_for(self.max_model_len):
            wanted = (1 << (blocks_for(self.max_model_len) - 1).bit_length()) * BLOCK_SIZE * self.token_memory
            raise ConfigError(
                f"--kv-memory must be at least {wanted} ({format_size(wanted)}): --max-model-len "
                f"{self.max_model_len} tokens, rounded up to a power of two of blocks, of --token-memory "
                f"{format_size(self.token_memory)} each, got {self.kv_memory}"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.kv_memory // (self.token_memory * BLOCK_SIZE)

    def sessions(self) -> list[Session]:
        """The workload, up to the session with which there are enough requests."""
        sessions = list(_up_to(WORKLOADS[self.workload](random.Random(self.seed)), self.requests))
        longest = max(session.longest for session in sessions)
        if longest > self.max_model_len:
            raise ConfigError(
                f"--max-model-len must be at least {longest}, the longest session of --workload "
                f"{self.workload}, got {self.max_model_len}"
            )
        return sessions


def _up_to(sessions: Iterator[Session], num_requests: int) -> Iterator[Session]:
    num_so_far = 0
    while num_so_far < num_requests:
        session = next(sessions)
        num_so_far += len(session.turns)
        yield session


def main(argv: list[str]) -> int:
    """Measure, print a table, write the files. Returns the exit code."""
    parser = Parser(
        "minivllm bench memory",
        "Which share of the KV memory holds tokens: paged, contiguous, and the Orca variants of the "
        "PagedAttention paper.",
    )
    parser.add_config(MemoryConfig, "memory")
    config = parser.make_config(MemoryConfig, parser.parse(argv))
    sessions = config.sessions()
    folder = None if config.output is None else _make_folder(config.output)

    num_slots = config.num_blocks * BLOCK_SIZE
    print(
        f"{format_size(config.kv_memory)} of KV memory, {config.num_blocks} blocks of {BLOCK_SIZE} tokens = "
        f"{num_slots} tokens; {config.users} users, {config.workload}"
    )
    start = time.monotonic()
    figures: dict[str, MemoryFigures] = {}
    for name, make_block_manager in ALLOCATIONS.items():
        figures[name] = measure(
            make_block_manager,
            sessions,
            users=config.users,
            num_blocks=config.num_blocks,
            max_model_len=config.max_model_len,
        )
    print("\n".join(table(figures)))
    print(f"{time.monotonic() - start:.1f} s")
    if folder is not None:
        write(folder, config, figures)
        print(f"written to {folder}: memory.json, memory.svg, block_map.svg")
    return 0


def table(figures: Mapping[str, MemoryFigures]) -> list[str]:
    """The figures for a terminal, the paper's in the lines below."""
    titles = ["tokens", "reserved", "lost inside", "lost outside", "free", "sequences", "preemptions"]
    rows = [("of the whole KV memory:", titles)]
    for name, found in figures.items():
        shares = [f"{found.shares[kind]:.1%}" for kind in KINDS]
        rows.append((name, [*shares, f"{found.sequences:.2f}", str(found.preemptions)]))
        if name in PUBLISHED:
            shares = [f"{PUBLISHED[name][kind]:.1%}" if kind in PUBLISHED[name] else "" for kind in KINDS]
            rows.append(("  published", [*shares, f"{PUBLISHED_SEQUENCES[name]:.2f}"]))
    lines = [f"{name:<24}" + "".join(f"{cell:>13}" for cell in cells) for name, cells in rows]
    lines.append("of the memory that sequences have been given, without a token:")
    lines += [f"  {name:<22}{found.allocated_without_token:>13.1%}" for name, found in figures.items()]
    lines += [
        f"{name}: requests waited for memory in only {found.waiting:.0%} of the steps; give more --users"
        for name, found in figures.items()
        if found.waiting < 0.99
    ]
    return lines


def write(folder: Path, config: MemoryConfig, figures: Mapping[str, MemoryFigures]) -> None:
    """memory.json, and the two pictures."""
    report = {
        "config": {name: value for name, value in asdict(config).items() if name != "output"},
        "num_blocks": config.num_blocks,
        "block_size": BLOCK_SIZE,
        "middle": MIDDLE,
        "allocations": {
            name: {
                "shares_of_kv_memory": found.shares,
                "share_of_allocated_without_token": found.allocated_without_token,
                "sequences": found.sequences,
                "preemptions": found.preemptions,
                "steps": found.steps,
                "share_of_steps_with_requests_waiting": found.waiting,
            }
            for name, found in figures.items()
        },
        "published": {"shares_of_kv_memory": PUBLISHED, "sequences": PUBLISHED_SEQUENCES},
    }
    (folder / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    bars = memory_bars.draw(
        {name: found.shares for name, found in figures.items()},
        {name: found.sequences for name, found in figures.items()},
    )
    maps = block_map.draw({name: found.block_map for name, found in figures.items()})
    import matplotlib

    # The same figures make the same file; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "minivllm", "svg.fonttype": "none"}):
        for name, figure in (("memory.svg", bars), ("block_map.svg", maps)):
            figure.savefig(folder / name, metadata={"Date": None})


def _make_folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {path} is no folder that can be written to: {error.strerror}") from error
    return folder
