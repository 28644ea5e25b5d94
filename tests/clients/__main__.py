"""``make clients``: starts a server of the embedded model, and lets other people's clients use it.

Each script ``check_*.py`` here runs in an environment of its own, where its client is installed, with the
server's URL in ``MINIVLLM_URL``. The exit code is 0 when all of them passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.reference import write_reference
from tests.serving.conftest import ROOT, serving

HERE = Path(__file__).parent
CLIENTS_PYTHON = ROOT / ".venv" / "clients" / "bin" / "python"
LM_EVAL = ROOT / ".venv" / "lm-eval"


def main() -> int:
    """Run every check, the failing ones too, and say how each ended."""
    results: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_reference(Path(folder))  # before the server starts: both would want every core
        with serving() as server:
            env = {
                **os.environ,
                "MINIVLLM_URL": server.url,
                "MINIVLLM_REFERENCE": folder,
                "HF_HUB_OFFLINE": "1",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or importing it asks GitHub for prices
            }
            for name in ("langchain", "litellm"):
                results[name] = _passes([str(CLIENTS_PYTHON), str(HERE / f"check_{name}.py")], env)
            env["PYTHONPATH"] = str(LM_EVAL)
            results["lm_eval"] = _passes([sys.executable, str(HERE / "check_lm_eval.py")], env)
    for name, passes in results.items():
        print(f"{name}: {'passed' if passes else 'FAILED'}")
    return 0 if all(results.values()) else 1


def _passes(command: list[str], env: dict[str, str]) -> bool:
    return subprocess.run(command, env=env, timeout=600).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
