"""How torch's CPU threads wait for each other."""

from __future__ import annotations

import os


def wait_without_spinning() -> None:
    """Have threads that wait for each other sleep. Takes effect only before torch is imported.

    By default GNU OpenMP's threads spin at every barrier. Where anything else wants a core (the
    HTTP server, another program), the one that all wait for has none to run on, and a step takes
    many times as long. Whoever sets ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` keeps their choice.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
