"""How torch's CPU threads wait for each other."""

from __future__ import annotations

import os

_SPIN_COUNT = "3000"  # some microseconds: longer than the pauses within a step, far shorter than a time slice


def spin_briefly() -> None:
    """Have threads that wait for each other go to sleep soon. Only works before torch is imported.

    By default GNU OpenMP's threads spin at a barrier for up to milliseconds. Where anything else
    wants a core (the HTTP server, another program), the thread that all wait for has none to run
    on, and a step takes many times as long. Threads that sleep at once lose a quarter of the speed
    on an idle machine; a short spin loses nothing. ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` in the
    environment take precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
