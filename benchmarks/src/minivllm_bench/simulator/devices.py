"""What devices can do at best: the makers' figures.

Memory is what ``nvidia-smi`` shows, in MiB: where a card has ECC in its own memory, less than its name says.
FLOP/s are those of dense 16-bit matrix products that add up in 32 bits; makers like to show twice that, with
sparsity, and on GeForce cards twice that again, adding up in 16 bits.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from minivllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU."""

    name: str
    memory: int
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes per second."""
    flops: float
    """Per second, dense, 16 bit in and 32 bit out."""
    source: str


_DEVICES = (
    # name, MiB, GB/s, TFLOP/s
    (
        "a10g",
        23028,
        600,
        70,
        "AWS, EC2 G5; half of the A10's tensor rate: NVIDIA has no data sheet of its own",
    ),
    ("a10", 23028, 600, 125, "NVIDIA A10 data sheet"),
    ("l4", 23034, 300, 121, "NVIDIA L4 data sheet; half of the figure with sparsity"),
    ("l40s", 46068, 864, 362, "NVIDIA L40S data sheet"),
    ("rtx3090", 24576, 936, 71, "NVIDIA Ampere GA102 white paper, table 9"),
    ("rtx4090", 24564, 1008, 165.2, "NVIDIA Ada GPU architecture white paper, appendix A"),
    ("a100-40gb", 40960, 1555, 312, "NVIDIA A100 data sheet"),
    ("a100-80gb", 81920, 2039, 312, "NVIDIA A100 data sheet, SXM"),
    ("h100", 81559, 3350, 989, "NVIDIA H100 data sheet, SXM; half of the figure with sparsity"),
    ("h200", 143771, 4800, 989, "NVIDIA H200 data sheet, SXM; half of the figure with sparsity"),
    ("b200", 183359, 8000, 2250, "NVIDIA HGX B200 data sheet; half of the figure with sparsity"),
)
DEVICES = {
    name: Device(name, mib * 2**20, gigabytes * 1e9, tera * 1e12, source)
    for name, mib, gigabytes, tera, source in _DEVICES
}
"""By the names that ``--device`` takes."""
_ALIASES = {"a100": "a100-80gb"}

CPU = "cpu"
"""Has no figures of its own: they come from ``--calibrate``."""


def find_device(name: str) -> Device:
    """By its name. Raises ConfigError for an unknown one, and lists the known."""
    name = name.lower()
    name = _ALIASES.get(name, name)
    if name not in DEVICES:
        near = difflib.get_close_matches(name, DEVICES, n=1)
        raise ConfigError(
            f"--device {name} is not known{f' (did you mean {near[0]}?)' if near else ''}; known are "
            f"{', '.join(DEVICES)}, and cpu with --calibrate"
        )
    return DEVICES[name]
