"""Tokenizers that only transformers can read: imported here, when there is no other way."""

from __future__ import annotations

from pathlib import Path

from minivllm.errors import ModelLoadError
from minivllm.tokenizer.tokenizer import Tokenizer


def load_with_transformers(directory: Path, chat_template: str | None) -> Tokenizer:
    """The tokenizer in ``directory``, converted by ``transformers.AutoTokenizer``, with a chat template.

    No remote code runs.

    Raises :class:`ModelLoadError` where transformers can't read it, or can't convert it to a
    ``tokenizers`` one.
    """
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever goes wrong in there, the file can't be used
        raise ModelLoadError(f"transformers can't read the tokenizer: {error}") from error
    if not loaded.is_fast:
        raise ModelLoadError(
            f"transformers reads the tokenizer as {type(loaded).__name__}, which has no fast form: "
            "save one as tokenizer.json"
        )
    if not loaded.encode("a", add_special_tokens=False):  # where tiktoken is installed, damaged files pass
        raise ModelLoadError("transformers finds no token for the letter a: the tokenizer is damaged")
    return Tokenizer(
        loaded.backend_tokenizer,
        special_tokens={
            name: text for name, text in loaded.special_tokens_map.items() if isinstance(text, str)
        },
        chat_template=chat_template,
    )
