"""What ``minivllm bench compare`` measures: its flags, and the engine's modes."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

from minivllm.config import flag, option
from minivllm.errors import ConfigError
from minivllm_bench.workloads import WORKLOADS

MINUTES_PER_CONTENDER = 3.6
"""Four modes take less than 15 minutes then."""


@dataclass(frozen=True, slots=True)
class Mode:
    """The engine with one way to hand out KV memory and one to schedule."""

    label: str
    flags: tuple[str, ...]


MODES = {
    "paged": Mode("paged + continuous", ("--kv-allocation", "paged", "--scheduler", "continuous")),
    "contiguous": Mode(
        "contiguous + continuous", ("--kv-allocation", "contiguous", "--scheduler", "continuous")
    ),
    "sequential-4": Mode("sequential, 4 slots", ("--preset", "ollama", "--num-parallel", "4")),
    "sequential-1": Mode("sequential, 1 slot", ("--preset", "ollama", "--num-parallel", "1")),
}
"""In the order of measuring. The last two are how Ollama-style runners do it: so many slots, each with KV
memory for the longest sequence, and a queue before them."""

QUICK = {"users": "1,8,50", "seconds": 3.0, "agent_steps": 4, "agent_users": "1", "minutes": 2.0}
"""``--quick``: other defaults."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Raises :class:`ConfigError` for impossible values."""

    output: str = option("compare", "folder for report.html, compare.json and compare.svg")
    model: str | None = option(
        None, "as of minivllm serve: a folder, a .gguf file or a Hugging Face id (default: the embedded one)"
    )
    modes: str = option(",".join(MODES), f"of the engine, with commas; of {', '.join(MODES)}; or none")
    url: tuple[str, ...] = option(
        (), "peers, as NAME=URL: servers with OpenAI's routes, such as ollama=http://127.0.0.1:11434"
    )
    users: str = option("1,2,4,8,16,32,50,64,128", "at once, with commas")
    workload: str = option("memoryless", "what users ask for", choices=tuple(WORKLOADS))
    seconds: float = option(12.0, "that each number of users is measured, after all have begun")
    agent_users: str = option("1,8", "agents at once, with commas; the later ones only if there is time")
    agent_steps: int = option(20, "steps of an agent, one after the other; 0: no agents")
    minutes: float | None = option(
        None, f"in all; what doesn't fit is left out (default: {MINUTES_PER_CONTENDER} per mode and peer)"
    )
    max_model_len: int = option(4096, "most tokens in a sequence: what the contiguous modes reserve for each")
    kv_cache_memory: int = option(2**30, "memory for KV blocks, the same in all modes", is_size=True)
    server_args: str = option("", "further flags for minivllm serve in all modes, in one argument")
    seed: int = option(0, "of the requests' lengths and words")

    def __post_init__(self) -> None:
        for mode in self.mode_names:
            if mode not in MODES:
                raise ConfigError(f"--modes takes {', '.join(MODES)}, or none, got {mode!r}")
        for name in ("users", "agent_users"):
            _counts(name, getattr(self, name))
        for name in ("seconds", "minutes"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{flag(name)} must be above 0, got {value:g}")
        if self.agent_steps < 0:
            raise ConfigError(f"--agent-steps must be at least 0, got {self.agent_steps}")
        names = [*self.mode_names, *self.peers]
        if not names:
            raise ConfigError("nothing to measure: give --modes, --url or both")
        if len(names) < len(self.mode_names) + len(self.url):
            raise ConfigError(f"--url takes a name for each peer, and each once, got {' '.join(self.url)}")

    @property
    def mode_names(self) -> list[str]:
        """In the order given, each once."""
        return [] if self.modes == "none" else list(dict.fromkeys(self.modes.split(",")))

    @property
    def peers(self) -> dict[str, str]:
        """URLs by name."""
        peers = {}
        for given in self.url:
            name, _, url = given.partition("=")
            if not name or not url.startswith(("http://", "https://")) or name in MODES:
                raise ConfigError(
                    f"--url takes NAME=URL, such as ollama=http://127.0.0.1:11434, got {given!r}"
                )
            peers[name] = url
        return peers

    @property
    def user_counts(self) -> list[int]:
        """Ascending, each once."""
        return _counts("users", self.users)

    @property
    def agent_user_counts(self) -> list[int]:
        """Ascending, each once; none without steps."""
        return _counts("agent_users", self.agent_users) if self.agent_steps else []

    @property
    def total_seconds(self) -> float:
        """All that may pass."""
        default = MINUTES_PER_CONTENDER * (len(self.mode_names) + len(self.url))
        return 60 * (default if self.minutes is None else self.minutes)

    def server_flags(self, mode: str) -> list[str]:
        """Of ``minivllm serve`` in one of the modes."""
        model = [] if self.model is None else ["--model", self.model]
        limits = ["--max-model-len", str(self.max_model_len), "--kv-cache-memory", str(self.kv_cache_memory)]
        return [*model, *MODES[mode].flags, *limits, *shlex.split(self.server_args)]

    def server_command(self, mode: str) -> list[str]:
        """What starts the server, but for its port."""
        return [sys.executable, "-m", "minivllm.serve", *self.server_flags(mode)]


def _counts(name: str, text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise ConfigError(f"{flag(name)} takes numbers from 1 on with commas, such as 1,8,50, got {text!r}")
    return counts
