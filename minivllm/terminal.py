"""What the commands write to the terminal: log lines on standard error."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: int = logging.INFO) -> None:
    """Send this package's log lines to standard error. Called by commands, never on import."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("minivllm")
    root.handlers = [handler]
    root.setLevel(level)
    root.propagate = False
