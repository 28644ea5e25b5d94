"""``docs/api.md`` and ``docs/metrics.md`` say what the code does now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minivllm.server.protocol import ChatRequest, CompletionRequest

ROOT = Path(__file__).parents[1]
API_MD = ROOT / "docs" / "api.md"


@pytest.mark.parametrize("name", ["api", "metrics"])
def test_it_is_up_to_date(name: str) -> None:
    code = f"import sys; sys.path.insert(0, 'docs'); import generate_{name} as g; print(g.main(), end='')"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / f"{name}.md").read_text() == made.stdout, "run `make docs`"


def test_every_field_is_there() -> None:
    text = API_MD.read_text()
    for model in (ChatRequest, CompletionRequest):
        for name in model.model_fields.keys() | model.unsupported:
            assert f"| `{name}` |" in text
