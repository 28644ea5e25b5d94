"""How long from launch to the first served token, and where the time goes.

    python benchmarks/startup.py [--runs 5] [--json FILE] [-- SERVE FLAGS]

Starts ``minivllm serve`` as a user would, waits until it takes connections, sends one chat request
for one token, and stops the server. The stages are the server's own log lines; they overlap, since
the engine process loads weights while the server process reads the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from minivllm_bench import machine

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}


def measure(flags: list[str]) -> dict[str, float]:
    """Seconds of each stage of one start, of the whole, and to the first token."""
    start = time.monotonic()
    command = [sys.executable, "-m", "minivllm.serve", "--port", "0", *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    stages: dict[str, float] = {}
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if match := re.search(r"I (.+): ([\d.]+) s$", line):
                stages[match[1]] = float(match[2])
            if match := re.search(r"serving .* on (http://\S+) after", line):
                stages["ready to serve"] = time.monotonic() - start
                break
        else:
            raise SystemExit(f"the server ended with code {server.wait()}")
        request = urllib.request.Request(
            match[1] + "/v1/chat/completions",
            json.dumps(CHAT).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            response.read()
        stages["first served token"] = time.monotonic() - start
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description="Time from launch to the first served token.")
    parser.add_argument(
        "--runs", type=int, default=5, help="starts to measure; medians are shown (default: 5)"
    )
    parser.add_argument("--json", type=Path, help="write every run to this file, too")
    parser.add_argument("flags", nargs="*", help="flags for minivllm serve, after --")
    args = parser.parse_args()
    runs = [measure(args.flags) for _ in range(args.runs)]
    for stage in runs[0]:
        seconds = [run[stage] for run in runs]
        print(
            f"{stage:>24}: {statistics.median(seconds):6.2f} s   ({min(seconds):.2f} to {max(seconds):.2f})"
        )
    if args.json is not None:
        args.json.write_text(
            json.dumps({"machine": machine.describe(), "flags": args.flags, "runs": runs}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
