"""``minivllm bench``: its own commands."""

from __future__ import annotations

import argparse
import importlib

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("minivllm_bench.serve", "put a load on a server, and measure what its users see"),
    "compare": ("minivllm_bench.compare", "this engine's modes, and peers, in one report"),
    "memory": ("minivllm_bench.memory", "how much of the KV memory holds tokens, for each allocation"),
}


def main(argv: list[str]) -> int:
    """Run one of them. Returns the exit code."""
    if argv and argv[0] in COMMANDS:
        code: int = importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
        return code
    parser = argparse.ArgumentParser(
        "minivllm bench",
        usage="minivllm bench COMMAND [flags]",
        epilog="minivllm bench COMMAND --help lists a command's flags.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, help) in COMMANDS.items():
        commands.add_parser(name, help=help)
    parser.parse_args(argv)
    return 2
