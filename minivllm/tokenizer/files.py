"""Reading a tokenizer's files, with errors that name them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minivllm.errors import ModelLoadError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put ``path`` before the message of a :class:`ModelLoadError` that names no file in its folder."""
    try:
        yield
    except ModelLoadError as error:
        message = str(error)
        if message.startswith((str(path), str(path.parent))):
            raise
        raise ModelLoadError(f"{path}: {message}") from error


def read_text(path: Path) -> str:
    """A file's contents as text. Raises :class:`ModelLoadError`, also where it isn't UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelLoadError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
