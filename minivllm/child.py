"""Processes of our own that run modules of this package."""

from __future__ import annotations

import os
import sys


def child_environment() -> dict[str, str]:
    """The environment in which a child finds the packages where this process found them, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
