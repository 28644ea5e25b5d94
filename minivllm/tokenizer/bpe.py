"""Building a :class:`tokenizers.Tokenizer` from a vocabulary in one of the two spellings of Llama models."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minivllm.errors import ModelLoadError
from minivllm.tokenizer.alphabet import SPACE


class TokenType(IntEnum):
    """What a token is for; the numbers are those of SentencePiece and of GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def byte_level_bpe(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    *,
    split_patterns: Sequence[str],
    ignore_merges: bool,
) -> Tokenizer:
    """GPT-2's kind: text is cut by regular expressions, one after the other, then merged byte by byte.

    ``ignore_merges``: a piece that is in the vocabulary as a whole is taken as it is, merges or not.

    Raises :class:`ModelLoadError` where merges and vocabulary don't fit.
    """
    backend = Tokenizer(_bpe_model(tokens, merges, ignore_merges=ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split_patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_bpe(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unk_token: str,
    add_space_prefix: bool,
) -> Tokenizer:
    """SentencePiece's kind: spaces become ``▁`` and the pair with the best score is merged first.

    ``add_space_prefix`` puts a ``▁`` before the text, and before what follows a special token.

    Raises :class:`ModelLoadError` where ``unk_token`` isn't in the vocabulary.
    """
    merges = _merges_from_scores(tokens, scores, types)
    model = _bpe_model(tokens, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    to_marks = normalizers.Replace(" ", SPACE)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), to_marks])
        backend.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = to_marks
        backend.decoder = decoders.Sequence(decoding)
    return backend


def mark_added_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Have control and user-defined tokens matched whole in the text, before anything is cut or merged."""

    def of_type(*wanted: TokenType, special: bool) -> list[AddedToken]:
        return [
            AddedToken(token, special=special, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in wanted
        ]

    backend.add_special_tokens(of_type(TokenType.CONTROL, TokenType.UNKNOWN, special=True))
    backend.add_tokens(of_type(TokenType.USER_DEFINED, special=False))


def add_around_text(backend: Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Have every encoded text begin with ``bos`` and end with ``eos``, where given.

    Raises :class:`ModelLoadError` where one of them isn't in the vocabulary.
    """
    ids = {token: backend.token_to_id(token) for token in (bos, eos) if token is not None}
    for token, token_id in ids.items():
        if token_id is None:
            raise ModelLoadError(f"texts get a {token!r}, which isn't in the vocabulary")
    if ids:
        backend.post_processor = processors.TemplateProcessing(
            single=[*([bos] if bos else []), "$A", *([eos] if eos else [])], special_tokens=list(ids.items())
        )


def _bpe_model(tokens: Sequence[str], merges: Sequence[tuple[str, str]], **options: bool | str) -> models.BPE:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if vocab[token] != token_id)
        raise ModelLoadError(f"the vocabulary has the token {twice!r} twice")
    try:
        return models.BPE(vocab, list(merges), **options)
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelLoadError(f"the vocabulary can't be used: {error}") from None


def _merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, best score first.

    SentencePiece has no list of merges: it joins the neighbours whose joint piece scores best, the
    leftmost where scores are equal. Two ways to make the same piece are equal for it and ranked here
    (earlier pieces first, as Hugging Face's converter has it), which can only differ where both
    overlap in the text. Control, byte and unused tokens never come out of a merge.
    """
    joinable = (TokenType.NORMAL, TokenType.USER_DEFINED)
    rank = {
        token: token_id
        for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in joinable
    }
    found: list[tuple[float, int, int]] = []
    for token, token_id in rank.items():
        for cut in range(1, len(token)):
            left, right = rank.get(token[:cut]), rank.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[token_id], left, right))
    found.sort()
    return [(tokens[left], tokens[right]) for _, left, right in found]
