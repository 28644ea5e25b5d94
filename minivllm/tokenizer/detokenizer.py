"""Token ids to text as they arrive, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from minivllm.tokenizer.tokenizer import Tokenizer

_MAX_CHAR_BYTES = 4  # of UTF-8


class IncrementalDetokenizer:
    """Text of one sequence's output, which continues its prompt.

    Tokens become bytes, and a streaming UTF-8 decoder turns those into text. It keeps at most the 3
    bytes of an unfinished character, so that a token costs the same however long the output is, and
    writes U+FFFD as soon as bytes can't become a character any more. What the pushes and the flush
    return is, put together, what the tokens decode to in one go.

    A character that the prompt's last token began is finished by the output. SentencePiece's space
    at the very start of a text is hidden only where the prompt shows no text before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        shown_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """``shown_token_ids``: special tokens that show their text all the same."""
        self._tokenizer = tokenizer
        self._hidden_token_ids = frozenset[int]()
        if skip_special_tokens:
            self._hidden_token_ids = tokenizer.special_token_ids - shown_token_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tail = self._last_bytes(prompt_token_ids)
        self._decoder.decode(tail)
        self._is_at_start = tokenizer.strips_leading_space and not tail

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that ``token_ids`` complete."""
        data = self._join_bytes(token_ids)
        if self._is_at_start and data:
            self._is_at_start = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD for a character that was never finished, else nothing. Call it once, at the end."""
        return self._decoder.decode(b"", final=True)

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The end of a prompt's text: as many tokens as it takes to hold an unfinished character."""
        tail = b""
        for token_id in reversed(token_ids):
            if len(tail) >= _MAX_CHAR_BYTES:
                break
            tail = self._join_bytes([token_id]) + tail
        return tail

    def _join_bytes(self, token_ids: Sequence[int]) -> bytes:
        return self._tokenizer.join_bytes(token_ids, hidden=self._hidden_token_ids)
