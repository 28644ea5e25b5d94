"""The ``minivllm`` command: ``minivllm serve``, ``minivllm chat`` and so on."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from minivllm import __version__
from minivllm.errors import InvalidRequestError, MinivllmError

# A command's module is imported when it is called: --help needs no torch.
COMMANDS = {
    "serve": ("minivllm.serve", "serve a model behind OpenAI routes"),
    "chat": ("minivllm.chat", "talk to a model in the terminal"),
    "generate": ("minivllm.generate", "complete one prompt and print it"),
    "bench": ("minivllm_bench.cli", "measure a server, compare the modes, look at memory"),
    "simulate": ("minivllm_bench.simulator.cli", "predict all that for hardware that isn't there"),
    "trace": ("minivllm.trace", "explain a file that serve --trace wrote"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit code: 1 where it can't start, 2 for wrong arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return run(argv[0], argv[1:])
    parser = argparse.ArgumentParser(
        "minivllm",
        usage="minivllm COMMAND [flags]",
        description="An LLM inference engine with a paged KV cache and continuous batching.",
        epilog="minivllm COMMAND --help lists a command's flags.",
    )
    parser.add_argument("--version", action="version", version=f"minivllm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, help) in COMMANDS.items():
        commands.add_parser(name, help=help)
    parser.parse_args(argv)
    return 2


def run(command: str, argv: list[str]) -> int:
    """Run one command; what goes wrong becomes one line on standard error."""
    _open_missing_streams()
    module = importlib.import_module(COMMANDS[command][0])
    try:
        code: int = module.main(argv)
        sys.stdout.flush()
    except MinivllmError as error:
        print(f"minivllm {command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidRequestError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes there
        return 141
    except OSError as error:
        print(f"minivllm {command}: error: {error}", file=sys.stderr)
        return 1
    return code


def _open_missing_streams() -> None:
    """Where standard error, say, is closed, have it go nowhere, for this process and its children."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the one that was closed
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))


if __name__ == "__main__":
    sys.exit(main())
