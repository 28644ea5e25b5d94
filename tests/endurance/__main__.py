"""``make endurance ARGS="soak chaos --seed 7 --output FILE"``: runs parts, prints what holds, writes JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from minivllm_bench import machine

PARTS = ("soak", "chaos", "overload", "slow_clients", "fuzz")
ROOT = Path(__file__).parents[2]


def main() -> int:
    """Returns 1 where a promise is broken."""
    parser = argparse.ArgumentParser(
        "make endurance", description="Runs that show what holds in the long run."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--seed", type=int, help="of lengths, moments and mutations (default: another each time)"
    )
    parser.add_argument("--quick", action="store_true", help="short versions, as in the test suite")
    parser.add_argument("--output", type=Path, help="a JSON file for the results; other parts in it stay")
    parsed = parser.parse_args()
    for part in parsed.parts:
        if part not in PARTS:
            parser.error(f"PART must be one of {', '.join(PARTS)}, got {part}")
    seed = random.SystemRandom().randrange(2**32) if parsed.seed is None else parsed.seed
    is_broken = False
    for part in parsed.parts or PARTS:
        print(f"{part}, seed {seed}", flush=True)
        about = machine.describe() | {"busy processes": machine.busy_processes()}
        start = time.monotonic()
        findings = importlib.import_module(f"tests.endurance.{part}").run(seed=seed, quick=parsed.quick)
        broken = findings.broken(quick=parsed.quick)
        is_broken |= bool(broken)
        seconds = time.monotonic() - start
        print(f"  {len(findings.promises)} promises, {len(broken)} broken, {seconds:.0f} s", flush=True)
        if parsed.output is not None:
            _write(parsed.output, part, {
                "seed": seed,
                "quick": parsed.quick,
                "seconds": round(seconds, 1),
                "revision": machine.revision(ROOT),
                "machine": about,
                **findings.as_json(),
            })  # fmt: skip
    return int(is_broken)


def _write(path: Path, part: str, results: dict[str, Any]) -> None:
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts[part] = results
    path.write_text(json.dumps(parts, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
