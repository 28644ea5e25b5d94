"""Certificates for tests, made by the ``openssl`` command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate for localhost, and its key."""

    cert: str
    key: str


def make_certificate(folder: Path, name: str, *more: str) -> Certificate:
    """Skips the test where there is no ``openssl``."""
    if shutil.which("openssl") is None:
        pytest.skip("makes certificates with the openssl command")
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
            *(more or ["-nodes"]),
        ],
        check=True,
        capture_output=True,
    )
    return Certificate(str(cert), str(key))
