"""``minivllm bench serve`` against a real server: it sends what it says, and the server counts the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minivllm import cli

from .conftest import Server

SESSION = {"turns": [{"prompt_tokens": 40, "output_tokens": 6}, {"prompt_tokens": 10, "output_tokens": 5}]}


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_tokens_are_as_many_as_were_asked_for(endpoint: str, embedded_server: Server, tmp_path: Path) -> None:
    workload, output = tmp_path / "two_turns.jsonl", tmp_path / "out.json"
    workload.write_text(json.dumps(SESSION) + "\n")
    flags = ["--workload", str(workload), "--endpoint", endpoint, "--users", "2", "--num-requests", "4"]
    seed = ["--seed", "7" if endpoint == "chat" else "8"]  # their prompts shall not be cached already
    url = ["--url", embedded_server.url]
    assert cli.main(["bench", "serve", *url, *flags, *seed, "--output", str(output)]) == 0
    requests = json.loads(output.read_text())["requests"]
    first = [request for request in requests if request["turn"] == 0]
    second = [request for request in requests if request["turn"] == 1]
    assert (len(first), len(second)) == (2, 2)
    assert all(request["output_tokens"] == 6 for request in first)
    assert all(request["output_tokens"] == 5 for request in second)
    assert all(request["cached_tokens"] >= 32 for request in second)  # two blocks of 16 of the first turn
    if endpoint == "completions":
        assert all(request["prompt_tokens"] == 40 for request in first)
        assert all(request["cached_tokens"] == 0 for request in first)
        for one, other in zip(first, second, strict=True):
            # The answer's text may be other tokens than those that were sampled.
            assert abs(other["prompt_tokens"] - 56) <= 2, (one, other)
