"""The endurance runs in short: what they promise, without what takes a quiet machine or long times to see."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize("part", ["soak", "chaos", "overload", "slow_clients"])
def test_in_short(part: str) -> None:
    findings = importlib.import_module(f"tests.endurance.{part}").run(seed=0, quick=True)
    assert findings.promises
    assert findings.broken(quick=True) == []
