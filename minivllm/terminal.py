"""What the commands write to the terminal: log lines on standard error."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: int = logging.INFO) -> logging.Handler:
    """Send this package's log lines to standard error. Called by commands, never on import.

    Returns the handler. A filter there may set a record's ``request``, which goes before its message.
    """
    handler = logging.StreamHandler(sys.stderr)
    format = "%(asctime)s %(levelname).1s %(request)s%(message)s"
    handler.setFormatter(logging.Formatter(format, datefmt="%H:%M:%S", defaults={"request": ""}))
    root = logging.getLogger("minivllm")
    root.handlers = [handler]
    root.setLevel(level)
    root.propagate = False
    return handler
