"""What is measured, what is left out and what is said of it, with a server and a clock that are made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from minivllm.errors import ConfigError, MinivllmError
from minivllm_bench import compare
from minivllm_bench.compare_config import MODES, CompareConfig
from minivllm_bench.points import empty_agent_run, empty_point
from minivllm_bench.results import AgentRun, Contender, Point
from minivllm_bench.sweep import AGENT_SECONDS, LEAST_WARM_UP, NO_TIME, Budget, longest_warm_up, sweep
from tests.bench import made_up


class Fake:
    """A target each of whose points takes the time that it may take, on the budget's clock."""

    def __init__(self, fails_at: int | None = None, agent_seconds: float = 10.0) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, int, int]] = []
        self.limits: list[float] = []
        self._fails_at = fails_at
        self._agent_seconds = agent_seconds

    def point(self, users: int, warm_up: float, seconds: float, seed: int) -> Point:
        self.asked.append(("point", users, seed))
        assert LEAST_WARM_UP <= warm_up <= longest_warm_up(users)
        self.now += warm_up + seconds
        if users == self._fails_at:
            raise MinivllmError("HTTP 500: out of luck")
        return empty_point(users)

    def agents(self, users: int, steps: int, limit: float, seed: int) -> AgentRun:
        self.asked.append(("agents", users, seed))
        self.limits.append(limit)
        self.now += min(limit, self._agent_seconds * users)
        return empty_agent_run(users, steps)


def swept(fake: Fake, config: CompareConfig, seconds: float) -> tuple[Contender, list[str], int]:
    contender = made_up.contender("paged")
    contender["points"], contender["agents"] = [], []
    begun: list[str] = []
    saved = 0

    def save() -> None:
        nonlocal saved
        saved += 1
        assert len(contender["points"]) + len(contender["agents"]) == saved

    budget = Budget(seconds, lambda: fake.now)
    sweep(contender, fake, config, budget, begin=begun.append, save=save)
    return contender, begun, saved


CONFIG = CompareConfig(users="1,4,16", seconds=10.0, agent_users="1,8")


def test_each_number_of_users_then_agents_each_saved() -> None:
    contender, begun, saved = swept(fake := Fake(), CONFIG, 1000.0)
    assert [what for what, _, _ in fake.asked] == ["point"] * 3 + ["agents"] * 2
    assert [users for _, users, _ in fake.asked] == [1, 4, 16, 1, 8]
    assert len({seed for _, _, seed in fake.asked}) == 5  # no prompt comes twice
    assert saved == 5
    assert begun[0] == "paged + continuous, 1 user"
    assert begun[-1] == "paged + continuous, 8 agents"
    assert fake.limits == [AGENT_SECONDS, AGENT_SECONDS]
    assert [point["skipped"] for point in contender["points"]] == [None] * 3


def test_modes_get_the_same_seeds_and_another_seed_gives_others() -> None:
    swept(one := Fake(), CONFIG, 1000.0)
    swept(two := Fake(), CONFIG, 1000.0)
    swept(other := Fake(), CompareConfig(users="1,4,16", seconds=10.0, seed=1), 1000.0)
    assert one.asked == two.asked
    assert not {seed for _, _, seed in one.asked} & {seed for _, _, seed in other.asked}


@pytest.mark.parametrize("seconds", [0.0, 11.0, 12.2, 25.0, 40.0, 60.0, 130.0])
def test_the_time_is_kept_and_what_does_not_fit_says_so(seconds: float) -> None:
    contender, begun, saved = swept(fake := Fake(agent_seconds=500.0), CONFIG, seconds)
    assert fake.now <= seconds
    assert len(contender["points"]) == 3
    assert len(contender["agents"]) == 2
    done = [point["users"] for point in contender["points"] if point["skipped"] is None]
    assert done == [users for what, users, _ in fake.asked if what == "point"]
    assert {point["skipped"] for point in contender["points"]} <= {None, NO_TIME}
    left_out = sum(run["skipped"] == NO_TIME for run in contender["agents"])
    assert left_out == 2 - len(fake.limits)
    assert all(limit >= 10.0 for limit in fake.limits)
    assert len(begun) == saved == 5


def test_after_a_failure_nothing_more_is_asked_of_a_server() -> None:
    contender, _, _ = swept(fake := Fake(fails_at=4), CONFIG, 1000.0)
    assert [users for _, users, _ in fake.asked] == [1, 4]
    assert contender["failed"] == "HTTP 500: out of luck"
    assert [point["failed"] for point in contender["points"]] == [None, "HTTP 500: out of luck", None]
    assert contender["points"][2]["skipped"] is not None
    assert all(run["skipped"] is not None for run in contender["agents"])


def test_time_that_one_does_not_need_goes_to_the_next() -> None:
    now = 0.0
    budget = Budget(100.0, lambda: now)
    assert budget.share(4).left() == 25.0
    now = 10.0
    assert budget.share(3).left() == 30.0
    now = 110.0
    assert budget.share(1).left() < 0


def test_a_mode_that_does_not_start_says_so_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    stopped: list[str] = []

    class Process:
        def __init__(self, mode: str) -> None:
            self.mode = mode

        def stop(self) -> None:
            stopped.append(self.mode)

    class Server:
        start_seconds = 2.0

        def __init__(self, mode: str) -> None:
            self.url, self.process = f"http://{mode}", Process(mode)

    def start_server(command: list[str], env: dict[str, str]) -> Server:
        started.append(command)
        if "contiguous" in command:
            raise compare.ContenderError("it ended; out of memory")
        return Server("sequential" if "ollama" in command else "paged")

    fake = Fake()
    monkeypatch.setattr(compare, "start_server", start_server)
    monkeypatch.setattr(compare.Http, "check", lambda self: "a model")
    monkeypatch.setattr(compare.Http, "point", lambda self, *args: fake.point(*args))
    monkeypatch.setattr(compare.Http, "agents", lambda self, *args: fake.agents(*args))
    config = CompareConfig(modes="paged,contiguous,sequential-1", users="1,2", seconds=1.0)
    comparison = made_up.comparison(*(made_up.contender(name) for name in config.mode_names))
    for contender in comparison["contenders"]:
        contender["points"], contender["agents"] = [], []
    compare.measure(comparison, config, Budget(1000.0, lambda: fake.now), lambda what: None, lambda: None)
    assert [contender["failed"] for contender in comparison["contenders"]] == [
        None, "it ended; out of memory", None,
    ]  # fmt: skip
    assert [users for what, users, _ in fake.asked if what == "point"] == [1, 2, 1, 2]
    assert stopped == ["paged", "sequential"]
    assert comparison["model"] == "a model"


@pytest.mark.parametrize("mode", MODES)
def test_all_modes_get_the_same_memory_and_differ_in_what_they_say(mode: str) -> None:
    flags = CompareConfig(server_args="--seed '7'", model="m").server_flags(mode)
    assert flags[:2] == ["--model", "m"]
    assert flags[-6:] == ["--max-model-len", "4096", "--kv-cache-memory", str(2**30), "--seed", "7"]
    assert tuple(flags[2:-6]) == MODES[mode].flags


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"modes": "paged,vllm"}, ["--modes", "sequential-1", "'vllm'"]),
        ({"modes": "none"}, ["nothing to measure", "--url"]),
        ({"users": "1,x"}, ["--users", "'1,x'"]),
        ({"users": "0,1"}, ["--users", "from 1 on", "'0,1'"]),
        ({"agent_users": ""}, ["--agent-users"]),
        ({"seconds": 0.0}, ["--seconds", "above 0"]),
        ({"minutes": -1.0}, ["--minutes", "-1"]),
        ({"minutes": float("nan")}, ["--minutes", "nan"]),
        ({"agent_steps": -1}, ["--agent-steps", "-1"]),
        ({"url": ("http://x",)}, ["--url takes NAME=URL", "'http://x'"]),
        ({"url": ("paged=http://x",)}, ["--url takes NAME=URL"]),
        ({"url": ("a=http://x", "a=http://y")}, ["each once"]),
    ],
)
def test_wrong_settings_name_the_flag(settings: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        CompareConfig(**settings)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(e.value)


def test_counts_are_sorted_and_modes_keep_their_order() -> None:
    config = CompareConfig(users="8,1,8", modes="sequential-1,paged,paged", agent_steps=0)
    assert config.user_counts == [1, 8]
    assert config.mode_names == ["sequential-1", "paged"]
    assert config.agent_user_counts == []


def test_quick_gives_other_defaults_which_flags_override() -> None:
    parse: Callable[[list[str]], CompareConfig] = compare._parse
    assert parse(["--quick"]).user_counts == [1, 8, 50]
    assert parse(["--quick", "--users", "3"]).user_counts == [3]
    assert parse([]).total_seconds < 15 * 60
    assert parse(["--url", "a=http://x"]).total_seconds > parse([]).total_seconds
