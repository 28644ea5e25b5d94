"""Grammars that answers must follow: made of JSON schemas, regular expressions or choices, and bounded.

A grammar is a text in llguidance's dialect of Lark: rules in lower case, terminals in upper case,
``/regex/``, ``%json {schema}`` in any place, ``<|name|>`` for a special token. What it matches is the
whole answer. :attr:`minivllm.SamplingParams.grammar` takes one, and ``grammar_from_*`` make one:

>>> from minivllm.structured import grammar_from_choice, grammar_from_json_schema
>>> SamplingParams(grammar=grammar_from_choice(["yes", "no"]))

What a grammar may cost is limited on every stage, because a few hundred characters can ask for more than any
machine has: its length, the depth of a schema, what compiling takes, the states of its lexer, and the
time that the masks of its tokens take. llguidance (https://github.com/guidance-ai/llguidance) does the work:
it derives the lexer's states from regular expressions' derivatives and parses with Earley's algorithm.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from minivllm.errors import InvalidRequestError
from minivllm.request import MAX_GRAMMAR_CHARS

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_SCHEMA_DEPTH = 64
"""Objects and arrays inside each other, in a schema's text; what it describes may recur without end."""
MAX_COMPILE_SECONDS = 0.5
"""Of CPU time, for one grammar."""
MASK_BURST_SECONDS = 0.5
MASK_SECONDS_PER_TOKEN = 0.02
"""CPU time that the masks of one answer may take: a burst, and so much more with each token."""

T = TypeVar("T")

# By escape, as they are inside of brackets: of the complements, brackets of their own.
_ASCII_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "D": "[^0-9]", "W": "[^0-9A-Za-z_]"}
_TRIAL_WALKS, _TRIAL_TOKENS = 3, 16
_JSON_OPTIONS = {
    # Compact, or indented by tabs or by spaces. JSON allows space without end, in which models get lost.
    "whitespace_pattern": r"( |\n( {0,32}|\t{0,8}))?",
    "whitespace_flexible": True,
    "coerce_one_of": False,  # alternatives that may overlap are refused
    "lenient": False,  # a keyword that isn't supported is refused, never ignored
}


def grammar_from_json_schema(schema: dict[str, Any] | bool | str) -> str:
    """The grammar of the JSON texts that satisfy ``schema``, its properties in the schema's order.

    Every keyword has an effect or is refused when the grammar is checked: ``not``, ``if``,
    ``uniqueItems``, ``contains`` and such can't be expressed. References stay within the schema; nothing
    is ever fetched.

    Args:
        schema: JSON Schema, draft 2020-12 or older, or its text.

    Raises:
        InvalidRequestError: not a schema, too long, or nested too deeply.
    """
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if schema is True:
            schema = {}
        if not isinstance(schema, (dict, bool)):
            raise InvalidRequestError(f"a JSON schema must be an object, got {type(schema).__name__}")
        if nesting_depth(schema) > MAX_SCHEMA_DEPTH:
            raise InvalidRequestError(f"a JSON schema must be nested at most {MAX_SCHEMA_DEPTH} deep")
        with_options = schema if isinstance(schema, bool) else {**schema, "x-guidance": _JSON_OPTIONS}
        text = json.dumps(with_options, allow_nan=False)
    except RecursionError:
        raise InvalidRequestError(
            f"a JSON schema must be nested at most {MAX_SCHEMA_DEPTH} deep; this one is far deeper"
        ) from None
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"the JSON schema isn't JSON: {error}") from None
    return _bounded(f"start: %json {text}")


def grammar_from_json_object() -> str:
    """The grammar of any JSON object."""
    return grammar_from_json_schema({"type": "object"})


def grammar_from_regex(pattern: str) -> str:
    """The grammar of the texts that ``pattern`` matches from beginning to end, ``re.fullmatch``'s way.

    The syntax is that of Rust's regex crate: Python's without look-around and back references. ``\\d``,
    ``\\w``, ``\\D`` and ``\\W`` are ASCII's, as in JSON Schema's ``pattern``: beyond it, libraries differ on
    what a letter is.
    """
    return _bounded(f"start: /{_escape_regex(pattern)}/")


def grammar_from_choice(choices: Sequence[str]) -> str:
    """The grammar of exactly these texts.

    Raises :class:`InvalidRequestError` where there is none, or one isn't a string.
    """
    if isinstance(choices, str) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InvalidRequestError(f"choices must be a list of at least 1 string, got {choices!r}"[:200])
    return _bounded("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, dict.fromkeys(choices))))


def grammar_from_lark(text: str) -> str:
    """``text`` itself, if it isn't too long or empty."""
    if not text.strip():
        raise InvalidRequestError("a grammar must have at least a rule called start, got an empty text")
    return _bounded(text)


def check_grammar(grammar: str) -> None:
    """Compile a grammar, without a model's vocabulary, to see whether it can be.

    Raises :class:`InvalidRequestError` with what is wrong with it.
    """
    from llguidance import LLMatcher

    def check() -> tuple[bool, list[str]]:
        return LLMatcher.validate_grammar_with_warnings(grammar, None, limits=parser_limits())

    is_error, messages = run_in_deep_thread(check, stack_size=2**28)
    if is_error:
        raise InvalidRequestError(f"the grammar can't be used: {describe(messages[0])}", param="grammar")


def describe(message: str) -> str:
    """llguidance's message, in one line of moderate length."""
    first, *others = message.splitlines() or [""]
    # Of a regular expression, the first line says where, and this one what.
    first = " ".join([first, *(line for line in others if line.startswith("error: "))])
    first = first.replace("<non-verbose/>", "").split(" Enable 'coerce_one_of'")[0].strip()
    for prefix in ("at 1(8): ", "failed to compile JSON schema: "):
        first = first.removeprefix(prefix)
    return first if len(first) <= 300 else first[:300] + "…"


def parser_limits() -> LLParserLimits:
    """What one grammar may take of time and memory in llguidance."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        max_grammar_size=100_000,
        max_lexer_states=50_000,
        max_items_in_row=1_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        verbose_errors=False,
    )


class Vocabulary:
    """A model's tokens, in the shape that llguidance takes them in.

    Args:
        tokens: each token's bytes, by id; empty for ids that have none (a padded embedding).
        special_token_ids: tokens that are no text: a grammar means them only by name.
        eos_token_ids: what ends an answer; at least one.
        encode: text to token ids. None: the longest token that fits, again and again.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self,
        tokens: list[bytes],
        *,
        special_token_ids: Iterable[int],
        eos_token_ids: Iterable[int],
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = sorted(i for i in special_token_ids if i < len(tokens))
        self.eos_token_ids = list(eos_token_ids)
        self.eos_token_id = self.eos_token_ids[0]
        self._encode = encode
        self._special = set(self.special_token_ids)
        self._id_of = {data: i for i, data in enumerate(tokens) if data and i not in self._special}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids whose bytes are exactly ``text``'s; llguidance asks where a grammar leaves no choice."""
        data = text if isinstance(text, bytes) else text.encode()
        if self._encode is not None:
            words = data.decode(errors="replace")
            # SentencePiece puts a space before a text: behind a line's end, it can be cut off again.
            for lead in ("", "\n"):
                before, ids = self._encode(lead) if lead else [], self._encode(lead + words)
                rest = ids[len(before) :]
                if ids[: len(before)] == before and self._spell(rest) == data:
                    return rest
        return self._encode_greedily(data)

    def build(self) -> LLTokenizer:
        """llguidance's own tables: a third of a second for 49,000 tokens."""
        from llguidance import LLTokenizer

        wrapper: Any = self  # it asks for is_tokenizer_wrapper, not for the class
        return LLTokenizer(wrapper, n_vocab=len(self.tokens), eos_token=self.eos_token_ids)

    def _spell(self, token_ids: list[int]) -> bytes | None:
        """The text of ``token_ids``; None where one isn't text, as an encoder reads "</s>"."""
        if any(i >= len(self.tokens) or i in self._special for i in token_ids):
            return None
        return b"".join([self.tokens[i] for i in token_ids])

    def _encode_greedily(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            lengths = range(min(self._longest, len(data) - start), 0, -1)
            length = next((n for n in lengths if data[start : start + n] in self._id_of), 0)
            if length == 0:
                return []  # no tokens make this text: llguidance goes on without a hint
            ids.append(self._id_of[data[start : start + length]])
            start += length
        return ids


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of an answer; :meth:`LLMatcher.deep_copy` makes more of them.

    Raises :class:`InvalidRequestError` where the grammar can't be used.
    """
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    if matcher.is_error():
        raise InvalidRequestError(
            f"the grammar can't be used: {describe(matcher.get_error())}", param="grammar"
        )
    return matcher


def try_grammar(tokenizer: LLTokenizer, grammar: str) -> None:
    """Compile a grammar and follow it for a few random tokens, to see whether it can be served.

    Raises :class:`InvalidRequestError` where it can't be compiled, or asks for more time than
    :data:`MAX_COMPILE_SECONDS` or :data:`MASK_BURST_SECONDS`.
    """
    start = time.thread_time()
    compiled = compile_grammar(tokenizer, grammar)
    seconds = time.thread_time() - start
    if seconds > MAX_COMPILE_SECONDS:
        raise InvalidRequestError(
            f"the grammar is too complex: compiling it took {seconds:.1f} s, "
            f"at most {MAX_COMPILE_SECONDS:g} are allowed"
        )
    rng = random.Random(0)
    start = time.thread_time()
    for _ in range(_TRIAL_WALKS):
        matcher = compiled.deep_copy()
        for _ in range(_TRIAL_TOKENS):
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            if matcher.is_error():
                raise InvalidRequestError(f"the grammar is too complex: {describe(matcher.get_error())}")
            if time.thread_time() - start > MASK_BURST_SECONDS / 2:
                raise InvalidRequestError(
                    "the grammar is too complex: finding out which tokens may come next takes too long"
                )
            if mask == 0:
                raise InvalidRequestError("the grammar has a dead end: no token of this model can go on")
            matcher.consume_token(_random_bit(mask, rng))
            if matcher.is_stopped():
                break


def run_in_deep_thread(function: Callable[[], T], *, stack_size: int) -> T:
    """Call ``function`` in a thread whose stack has so many bytes: llguidance recurs as deep as a grammar."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    before = threading.stack_size(stack_size)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    return future.result()


def _random_bit(mask: int, rng: random.Random) -> int:
    """One of the bits that are set. Bits that follow many others that aren't are likelier, which is fine."""
    above = mask >> rng.randrange(mask.bit_length())
    shift = mask.bit_length() - above.bit_length()
    return shift + (above & -above).bit_length() - 1


def nesting_depth(value: Any) -> int:
    """How many objects and arrays lie in each other, at most."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _escape_regex(pattern: str) -> str:
    """A regular expression as Lark has it between slashes; \\d, \\w and their complements become ASCII's."""
    out: list[str] = []
    depth = 0  # of brackets: a class in a class is itself again
    place = 0
    while place < len(pattern):
        char = pattern[place]
        place += 1
        if char == "\\" and place < len(pattern):
            escaped = pattern[place]
            place += 1
            if escaped in _ASCII_CLASSES:
                out.append(_ASCII_CLASSES[escaped] if depth else f"[{_ASCII_CLASSES[escaped]}]")
            else:
                out.append("\\n" if escaped == "\n" else char + escaped)
            continue
        out.append({"\n": "\\n", "/": "\\/"}.get(char, char))
        if char == "[":
            depth += 1
            for literal in ("^", "]"):  # a bracket that comes first closes nothing
                if pattern.startswith(literal, place):
                    out.append(literal)
                    place += 1
        elif char == "]":
            depth = max(0, depth - 1)
    return "".join(out)


def _bounded(grammar: str) -> str:
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(
            f"a grammar must have at most {MAX_GRAMMAR_CHARS} characters, got {len(grammar)}", param="grammar"
        )
    try:
        grammar.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the grammar can't be encoded: character {error.start} is a lone surrogate", param="grammar"
        ) from None
    return grammar
