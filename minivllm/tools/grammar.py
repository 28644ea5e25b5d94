"""Grammars, in llguidance's dialect of Lark, of the answers in which tools are called as they must be."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from minivllm.errors import InvalidRequestError
from minivllm.request import MAX_GRAMMAR_CHARS
from minivllm.tools import llama_json, reasoning
from minivllm.tools.style import ToolStyle
from minivllm.tools.tool import Choice, Tool

# JSON as Python writes it, which models have seen most; free whitespace is where weak ones get lost.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT = {"type": "object"}


# What the schema of a function's parameters may say beside "properties" if they are to be keywords.
_KEYWORD_SCHEMA = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "$defs", "definitions"),
        *("$schema", "$comment", "title", "description", "default", "examples", "deprecated"),
    }
)

# Where a schema's keywords hold no schemas, and where the keys are no keywords.
_DATA = frozenset({"const", "enum", "default", "examples"})
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})

# The schema of all parameters, in the schema of one.
_ROOT = "#/$defs/parameters"


@dataclass(frozen=True, slots=True)
class ToolGrammar:
    """What an answer must be."""

    text: str
    parts: list[tuple[int, str]]
    """Of each tool that may be called: its index, and the grammar of its calls, to see which is at fault."""


def tool_grammar(
    style: ToolStyle,
    tools: Sequence[Tool],
    choice: Choice,
    *,
    is_parallel: bool,
    named: str | None = None,
    may_reason: bool = False,
    is_reasoning: bool = False,
) -> ToolGrammar:
    """The grammar of an answer that calls some of ``tools``; with choice "auto" it may be text instead.

    Args:
        style: how calls are written; the style's parser reads all that the grammar allows.
        tools: all that were offered. Their schemas hold, if ``choice`` is "required" or the tool is strict.
        choice: whether there must be a call.
        is_parallel: whether there may be several.
        named: the one that may be called, instead of all.
        may_reason: reasoning may come first, between its tags.
        is_reasoning: the prompt has opened it.

    Raises:
        InvalidRequestError: a schema that can't be put so; ``param`` says whose. Whether llguidance can
            follow the schemas is to be checked.
    """
    offered = [i for i, tool in enumerate(tools) if named in (None, tool.name)]
    of_tool: dict[int, list[str]] = {}
    for i in offered:
        holds = choice == "required" or tools[i].is_strict
        with _blaming(i):
            rules_of_call = _call(style.name, f"f{i}", tools[i], tools[i].parameters if holds else None)
            of_tool[i] = [*_bounded(rules_of_call)]
    rules = [rule for rules in of_tool.values() for rule in rules]
    rules.append(f"call: {' | '.join(f'f{i}' for i in offered)}")
    # Where a tag may open reasoning, text begins with something else, to tell them apart.
    no_text = "<" if may_reason and not is_reasoning else ""
    answer = [*_ANSWERS[style.name](choice == "required", is_parallel, no_text)]
    if may_reason or is_reasoning:
        opening = "" if is_reasoning else f"{_text(reasoning.OPEN)} "
        answer += [
            f"start: reasoning{'' if is_reasoning else '?'} answer",
            f"reasoning: {opening}reasoned /\\n{{0,2}}/",
            f"reasoned[lazy]: /(.|\\n)*/ {_text(reasoning.CLOSE)}",
        ]
    else:
        answer.append("start: answer")
    parts = [(i, "\n".join([f"start: f{i}", *of_tool[i]])) for i in offered]
    return ToolGrammar("\n".join([*answer, *rules]) + "\n", parts)


@contextlib.contextmanager
def _blaming(index: int) -> Iterator[None]:
    """What a tool's schema is refused for names the tool."""
    try:
        yield
    except InvalidRequestError as error:
        error.param = f"tools[{index}].function.parameters"
        raise


def _bounded(rules: Iterable[str]) -> Iterator[str]:
    """The rules, as long as they aren't too long: a schema's definitions are repeated in many of them."""
    num_chars = 0
    for rule in rules:
        num_chars += len(rule)
        if num_chars > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"the grammar of a function's calls must have at most {MAX_GRAMMAR_CHARS} characters, "
                "this one has more: name fewer parameters, or shorter definitions"
            )
        yield rule


def _hermes(is_required: bool, is_parallel: bool, no_text: str) -> Iterator[str]:
    """Text may come before and after calls, but whatever follows an opening tag is a call."""
    if is_required:
        yield f"answer: tagged{_more('tagged', _NEWLINE) if is_parallel else ''}"
        yield f"tagged: {_text('<tool_call>')} inside"
    else:
        yield f"answer: {'tagged* TEXT' if is_parallel else 'tagged | TEXT'}"
        yield f"TEXT: /([^{no_text}](.|\\n)*)?/" if no_text else "TEXT: /(.|\\n)*/"
        yield "tagged: opened inside"
        yield f"opened[lazy]: TEXT {_text('<tool_call>')}"
    yield f"inside: {_NEWLINE} call {_text(chr(10) + '</tool_call>')}"


def _llama_json(is_required: bool, is_parallel: bool, no_text: str) -> Iterator[str]:
    """Text may not begin as a call does, and nowhere hold the tag that a call may follow."""
    yield f"answer: {'calls' if is_required else '(calls | TEXT)?'}"
    yield f"calls: call{_more('call', _text('; ')) if is_parallel else ''}"
    yield f"TEXT: /[^\\s{{;{no_text}](.|\\n)*/ & ~/(.|\\n)*{re.escape(llama_json.TAG)}(.|\\n)*/"


def _pythonic(is_required: bool, is_parallel: bool, no_text: str) -> Iterator[str]:
    """Text may not begin as a call does."""
    yield f"answer: {'calls' if is_required else '(calls | TEXT)?'}"
    yield f'calls: "[" call{_more("call", _text(", ")) if is_parallel else ""} "]"'
    yield f"TEXT: /[^\\s\\[{no_text}](.|\\n)*/"


_ANSWERS: dict[str, Callable[[bool, bool, str], Iterator[str]]] = {
    "hermes": _hermes,
    "llama3_json": _llama_json,
    "pythonic": _pythonic,
}


def _call(style: str, rule: str, tool: Tool, schema: Mapping[str, Any] | None) -> Iterator[str]:
    """The rules of a call of ``tool``; with arguments of any kind, if ``schema`` is None."""
    if style == "pythonic":
        yield f'{rule}: {_text(tool.name + "(")} {rule}_arguments ")"'
        yield from _any_keywords(rule) if schema is None else _keywords(rule, schema)
        return
    word = "arguments" if style == "hermes" else "parameters"
    start = f'{{"name": {json.dumps(tool.name)}, "{word}": '
    yield f'{rule}: {_text(start)} {_json(_ANY_OBJECT if schema is None else _closed(schema))} "}}"'


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema without arguments that nobody knows: models that may invent some don't stop."""
    is_plain = "properties" in schema and schema.keys() <= _KEYWORD_SCHEMA
    return {"additionalProperties": False, **schema} if is_plain else schema


def _any_keywords(rule: str) -> Iterator[str]:
    yield f"{rule}_arguments: ({rule}_pair{_more(f'{rule}_pair', _text(', '))})?"
    yield f'{rule}_pair: /[A-Za-z_][A-Za-z0-9_]*/ "=" {_json({})}'


def _keywords(rule: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """Keyword arguments in the schema's order: those that are required, and any of the others.

    Two rules for each place in the list: the rest with nothing before it, and the rest after a comma.
    """
    unknown = sorted(schema.keys() - _KEYWORD_SCHEMA)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if unknown or not isinstance(properties, dict) or not isinstance(required, list):
        what = f"not {unknown[0][:80]!r}" if unknown else "an object and a list"
        raise InvalidRequestError(
            'where calls are written as Python, a schema of parameters may have "properties" and "required", '
            f"{what}, to be followed"
        )
    for name in [*properties, *required]:
        if not isinstance(name, str) or not name.isidentifier() or name not in properties:
            raise InvalidRequestError(
                "where calls are written as Python, a parameter's name must be an identifier, and among "
                f'"properties", got {str(name)[:80]!r}'
            )
    root = _moved(_closed(schema))
    names = [name for name in properties if properties[name] is not False or name in required]
    yield f"{rule}_arguments: {rule}_first_0"
    for i, name in enumerate(names):
        value = properties[name]
        if not isinstance(value, (dict, bool)):
            raise InvalidRequestError(f"the schema of {name[:80]!r} must be an object, got {str(value)[:80]}")
        own = value if isinstance(value, dict) else {} if value else {"enum": []}
        if '"$ref"' in json.dumps(own):
            own = {"$ref": f"{_ROOT}/properties/{quote(name)}", "$defs": {"parameters": root}}
        yield f"{rule}_{i}: {_text(name + '=')} {_json(own)}"
        following = f"{rule}_rest_{i + 1}"
        if name in required:
            yield f"{rule}_first_{i}: {rule}_{i} {following}"
            yield f'{rule}_rest_{i}: ", " {rule}_{i} {following}'
        else:
            yield f"{rule}_first_{i}: {rule}_{i} {following} | {rule}_first_{i + 1}"
            yield f'{rule}_rest_{i}: (", " {rule}_{i})? {following}'
    yield f'{rule}_first_{len(names)}: ""'
    yield f'{rule}_rest_{len(names)}: ""'


def _moved(schema: Any) -> Any:
    """A schema whose references to its root lead to :data:`_ROOT`, where it is part of another."""
    if isinstance(schema, list):
        return [_moved(item) for item in schema]
    if not isinstance(schema, dict) or "$id" in schema:  # with an id, it is its own references' root
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value[:2] in ("#", "#/"):
            moved[key] = _ROOT + value[1:]
        elif key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            moved[key] = {name: _moved(named) for name, named in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value)
    return moved


def _more(rule: str, separator: str) -> str:
    return f" ({separator} {rule})*"


def _text(text: str) -> str:
    return json.dumps(text)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _COMPACT})}"


_NEWLINE = _text("\n")
