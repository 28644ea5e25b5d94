"""API keys: where the operator gives them, and whether a client's is one of them."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from minivllm.config import ServerConfig
from minivllm.errors import ConfigError

ENVIRONMENT_VARIABLE = "MINIVLLM_API_KEY"


class ApiKeys:
    """The keys that open this server. Only their digests are kept, so that nothing can print a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def name_of(self, key: bytes) -> str | None:
        """``"key-1"`` for the first of them, and so on; None if it is none of them.

        How long this takes tells nothing of how close a wrong one is.
        """
        digest, place = _digest(key), 0
        for number, known in enumerate(self._digests, start=1):  # all of them, even after a match
            place = max(place, number * hmac.compare_digest(digest, known))
        return f"key-{place}" if place else None


def load_api_keys(config: ServerConfig, environ: MutableMapping[str, str]) -> ApiKeys | None:
    """The keys from the flags, the key file and ``environ``; None where none of them is given.

    :data:`ENVIRONMENT_VARIABLE` is taken out of ``environ``: child processes have no need to know.

    Raises:
        ConfigError: a file that can't be read, a malformed key, or a place for keys without any in it,
            which would leave open a server that was meant to be closed. No message shows a key.
    """
    keys = _check("--api-key", config.api_key) if config.api_key else []
    if config.api_key_file is not None:
        path = Path(config.api_key_file)
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"can't read --api-key-file {path}: {reason}") from None
        keys += _check(
            f"--api-key-file {path}", [line for line in lines if line and not line.startswith("#")]
        )
    if (given := environ.pop(ENVIRONMENT_VARIABLE, None)) is not None:
        keys += _check(ENVIRONMENT_VARIABLE, [key.strip() for key in given.split(",") if key.strip()])
    return ApiKeys(keys) if keys else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _check(place: str, keys: Iterable[str]) -> list[str]:
    keys = list(keys)
    if not keys:
        raise ConfigError(f"{place} holds no API key; leave it out to serve without keys")
    for place_of_key, key in enumerate(keys, start=1):
        if re.fullmatch(r"[!-+\--~]+", key) is None:  # visible ASCII without the comma
            raise ConfigError(
                f"key {place_of_key} of {place} is not one that a header can carry: letters, digits and "
                "punctuation of ASCII, without spaces and commas"
            )
    return keys
