"""The tokenizer that the rest of the engine sees: text, token ids, bytes and chat messages."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import tokenizers

from minivllm.errors import ContextLengthError, InvalidRequestError
from minivllm.tokenizer.alphabet import read_alphabet

if TYPE_CHECKING:
    from minivllm.tokenizer.chat_template import ChatTemplate

_MANY_CHARS = 2**20
"""A text of more may take seconds and gigabytes."""


class Tokenizer:
    """A :class:`tokenizers.Tokenizer` with its special tokens and chat template.

    Made by :func:`minivllm.tokenizer.load_tokenizer`. Several threads may use one at the same time:
    what is kept after that (bytes of tokens, the compiled template) comes out the same in each.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
    ) -> None:
        """``special_tokens`` has names as keys: ``{"bos_token": "<s>", …}``.

        Raises :class:`ModelLoadError` for a kind of vocabulary that isn't supported.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._alphabet = read_alphabet(backend)
        self._bytes_of: dict[int, bytes] = {}
        added_tokens = backend.get_added_tokens_decoder()
        if self._alphabet.is_byte_level:
            # Added tokens are plain text: "é" isn't byte 0xE9, as it would be in the alphabet.
            self._bytes_of = {token_id: token.content.encode() for token_id, token in added_tokens.items()}
        self.special_token_ids = frozenset(
            token_id for token_id, token in added_tokens.items() if token.special
        )
        """Ids that show no text unless asked for."""
        self.special_tokens = dict(special_tokens)
        """Name to text, as chat templates see them."""
        self._template_source = chat_template
        self._template: ChatTemplate | None = None  # compiled when first used

    @cached_property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, added ones included. The model's embedding may be larger (padding)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def num_base_tokens(self) -> int:
        """Tokens in the vocabulary without the added ones: any text may become any of these."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a sequence."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends a sequence."""
        return self.special_tokens.get("eos_token")

    @property
    def chat_template(self) -> str | None:
        """The template's text; None where :meth:`apply_chat_template` can't work."""
        return self._template_source

    @property
    def chat_template_takes_tools(self) -> bool:
        """Whether the template does something with tools, or is missing, or broken: then nothing does."""
        if self._template_source is None:
            return False
        from minivllm.tokenizer.chat_template import takes_tools

        return takes_tools(self._template_source)

    def special_ids_of(self, texts: Collection[str]) -> frozenset[int]:
        """Those of :attr:`special_token_ids` whose text is one of ``texts``."""
        return frozenset(i for i in self.special_token_ids if self.token_to_text(i) in texts)

    @property
    def strips_leading_space(self) -> bool:
        """Whether one space at the very start of a text isn't shown (SentencePiece put it there)."""
        return self._alphabet.strips_leading_space

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of ``text``; with ``add_special_tokens`` between the model's BOS and EOS, if it has any.

        Special tokens spelled out in ``text`` become their ids. Text from a chat template brings its
        own BOS: encode it with ``add_special_tokens=False``. Other threads run meanwhile.

        Raises:
            InvalidRequestError: a lone surrogate, which is no character.
            ContextLengthError: the text is longer than any ``max_tokens`` tokens, or a beginning of it has
                twice as many. The rest isn't looked at then: megabytes take seconds, and gigabytes of memory.
        """
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text can't be encoded: character {error.start} is a lone surrogate "
                f"(U+{ord(text[error.start]):04X})"
            ) from None
        # Finding the longest token takes a walk over the vocabulary: only for a text that is long at all.
        if max_tokens is not None and num_bytes > max_tokens and num_bytes > max_tokens * self.longest_token:
            raise ContextLengthError(
                f"this model's maximum context length is {max_tokens} tokens of at most {self.longest_token} "
                f"bytes each, but the prompt has {num_bytes} bytes: shorten it",
                param="prompt",
            )
        if max_tokens is not None:
            self._check_beginnings(text, max_tokens)
        return self._encode(text, add_special_tokens)

    def _check_beginnings(self, text: str, max_tokens: int) -> None:
        """Raise ContextLengthError where it takes only a part of a large text to see that all is too much.

        Where a text is cut its tokens may be others: a beginning has to have twice as many as are allowed.
        """
        num_chars = _MANY_CHARS
        while num_chars < len(text):
            num_tokens = len(self._encode(text[:num_chars], add_special_tokens=False))
            if num_tokens > 2 * max_tokens:
                raise ContextLengthError(
                    f"this model's maximum context length is {max_tokens} tokens, but the first {num_chars} "
                    f"of the prompt's {len(text)} characters alone have {num_tokens}: shorten it",
                    param="prompt",
                )
            num_chars *= 2

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Not encode(), which keeps all other threads waiting, and works out where each token came from.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.token_bytes(token_id)) for token_id in range(self.vocab_size))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that aren't UTF-8 become U+FFFD, an unknown id shows nothing.

        Raises :class:`InvalidRequestError` for an id that no vocabulary can have.
        """
        data = self.join_bytes(token_ids, skip_special_tokens=skip_special_tokens)
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def join_bytes(
        self,
        token_ids: Iterable[int],
        *,
        skip_special_tokens: bool = True,
        hidden: frozenset[int] | None = None,
    ) -> bytes:
        """The bytes of ``token_ids``, one after the other; with ``hidden``, all but those."""
        if hidden is None:
            hidden = self.special_token_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in hidden)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, half a character included; special tokens: their text.

        Empty for an id that the vocabulary doesn't have (a padded embedding has such ids).
        Raises :class:`InvalidRequestError` for an id that no vocabulary can have.
        """
        known = self._bytes_of.get(token_id)
        if known is not None:
            return known
        if not 0 <= token_id < 2**32:
            raise InvalidRequestError(f"token ids must be from 0 to {self.vocab_size - 1}, got {token_id}")
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        self._bytes_of[token_id] = data = self._alphabet.to_bytes(token)
        return data

    def token_to_text(self, token_id: int) -> str:
        """A token for people: its text, with U+FFFD for bytes that aren't a character by themselves."""
        return self.token_bytes(token_id).decode(errors="replace")

    def set_chat_template(self, source: str) -> None:
        """Use another chat template (Jinja), from here on.

        Raises :class:`InvalidRequestError` where it isn't valid Jinja.
        """
        self._template_source = source
        self._template = self._compile(source)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for ``messages`` (``role`` and ``content``, a string), in the model's own format.

        Args:
            tools: what the template shows of functions, if it :attr:`chat_template_takes_tools`.
            add_generation_prompt: end with what begins the model's answer.
            continue_final_message: end with the last message's content, for the model to go on with.
            extra: further variables that the template reads.

        Raises :class:`InvalidRequestError` where the model has no template, or the template refuses
        the messages.
        """
        if self._template is None:
            if self._template_source is None:
                raise InvalidRequestError(
                    "this model has no chat template: send a plain prompt instead, or start serve or chat "
                    "with --chat-template FILE",
                    param="messages",
                )
            self._template = self._compile(self._template_source)
        render = partial(self._template.render, tools=tools, extra=extra)
        if not continue_final_message or not messages:
            return render(messages, add_generation_prompt=add_generation_prompt)
        # What the template writes after the content is cut off where a mark shows that the content ends.
        mark = f"<end of message {secrets.token_hex(16)}>"
        last = {**messages[-1], "content": (messages[-1].get("content") or "") + mark}
        text = render([*messages[:-1], last], add_generation_prompt=False)
        before, found, _ = text.rpartition(mark)
        if not found:
            raise InvalidRequestError(
                "continue_final_message: this model's chat template doesn't show the last message",
                param="continue_final_message",
            )
        return before

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_special_tokens: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """The token ids of :meth:`apply_chat_template`, which writes its own special tokens."""
        text = self.apply_chat_template(messages)
        return self.encode(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens)

    def _compile(self, source: str) -> ChatTemplate:
        from minivllm.tokenizer.chat_template import ChatTemplate  # jinja2, for those who chat

        return ChatTemplate(source, self.special_tokens)
