"""A model's tokenizer, whichever files it comes in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minivllm.errors import InvalidRequestError, ModelLoadError
from minivllm.tokenizer.alphabet import BYTE_TO_CHAR
from minivllm.tokenizer.bpe import byte_level_bpe
from minivllm.tokenizer.directory import TOKENIZER_FILES, tokenizer_from_directory
from minivllm.tokenizer.files import naming, read_text
from minivllm.tokenizer.gguf_vocab import tokenizer_from_gguf
from minivllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minivllm.weights.files import ModelFiles


def load_tokenizer(files: ModelFiles, *, chat_template: Path | None = None) -> Tokenizer:
    """A model's tokenizer, with the template in the file ``chat_template`` in place of its own.

    From a GGUF file's metadata, or from a folder's ``tokenizer.json``, ``tokenizer.model`` or what
    else transformers can read. A model with random weights may have none: it gets one token a byte.

    Raises :class:`ModelLoadError`, naming the file, where the tokenizer is missing, malformed, or of
    another model: with more tokens than the embedding has rows, ordinary text would have no vectors.
    Added tokens past the embedding are common (a padding token) and harmless, because only a prompt
    that spells one out can bring one, and that prompt is refused.
    """
    with naming(files.path):
        tokenizer = _load(files)
    if chat_template is not None:
        tokenizer.set_chat_template(read_chat_template(chat_template))
    return tokenizer


def read_chat_template(path: Path) -> str:
    """A template's text. Raises :class:`ModelLoadError` where it can't be read, or isn't valid Jinja."""
    from minivllm.tokenizer.chat_template import ChatTemplate  # jinja2, for those who chat

    source = read_text(path)
    try:
        ChatTemplate(source, {})
    except InvalidRequestError as error:
        raise ModelLoadError(f"{path}: {error}") from None
    return source


def _load(files: ModelFiles) -> Tokenizer:
    num_rows = files.config.vocab_size
    if files.path.suffix == ".gguf":
        from minivllm.weights.gguf import open_gguf

        tokenizer = tokenizer_from_gguf(open_gguf(files.path).metadata)
    elif any((files.path / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = tokenizer_from_directory(files.path)
    elif files.kind == "dummy":
        return _byte_tokenizer(num_rows)
    else:
        raise ModelLoadError(f"no tokenizer found: there must be one of {', '.join(TOKENIZER_FILES)}")
    if tokenizer.num_base_tokens > num_rows:
        raise ModelLoadError(
            f"the tokenizer has {tokenizer.num_base_tokens} tokens, but the embedding only {num_rows} rows: "
            "they belong to different models"
        )
    return tokenizer


def _byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A token for each byte; the rest of the vocabulary shows its numbers, ``<256>`` and so on."""
    tokens = [*BYTE_TO_CHAR.values(), *(f"<{i}>" for i in range(256, vocab_size))]
    return Tokenizer(byte_level_bpe(tokens, [], split_patterns=[], ignore_merges=False), special_tokens={})
