"""Grammars of tool calls: what they let a model write is what the parsers read, and the schemas hold."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest

from minivllm.errors import InvalidRequestError
from minivllm.request import MAX_GRAMMAR_CHARS
from minivllm.structured import check_grammar
from minivllm.tools import grammar as grammars
from minivllm.tools.style import STYLES
from minivllm.tools.tool import Tool

from .llg import accepts, write_at_random
from .reading import read

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 2},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 7}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(*args: Any, **settings: Any) -> str:
    """The grammar's text, checked; what is wrong with it names the tool."""
    grammar = grammars.tool_grammar(*args, **settings)
    try:
        check_grammar(grammar.text)
    except InvalidRequestError:
        for i, part in grammar.parts:
            try:
                check_grammar(part)
            except InvalidRequestError as error:
                raise InvalidRequestError(error.message, param=f"tools[{i}].function.parameters") from None
        raise
    return grammar.text


TOOLS = [Tool("get", "", NOTHING), Tool("get_weather", "The weather.", WEATHER)]


def write(style: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    if style == "pythonic":
        written = (
            f"{name}({', '.join(f'{k}={json.dumps(v, ensure_ascii=False)}' for k, v in a.items())})"
            for name, a in calls
        )
        return f"[{', '.join(written)}]"
    return STYLES[style].separator.join(STYLES[style].write(*call) for call in calls)


PARIS = ("get_weather", {"city": "Paris"})
LONG = ("get_weather", {"city": 'é"\\', "unit": "celsius", "days": [1, 7]})


def is_valid(name: str, arguments: Any) -> bool:
    """The two schemas above, in Python."""
    if not isinstance(arguments, dict) or name == "get":
        return arguments == {}
    known = {"city", "unit", "days"}
    days = arguments.get("days", [])
    return (
        "city" in arguments
        and arguments.keys() <= known
        and isinstance(arguments["city"], str)
        and len(arguments["city"]) <= 8
        and arguments.get("unit", "celsius") in ("celsius", "fahrenheit")
        and isinstance(days, list)
        and len(days) <= 2
        and all(type(day) is int and 1 <= day <= 7 for day in days)
    )


GOOD = [[PARIS], [LONG], [("get", {})]]
SEVERAL = [[PARIS, LONG, ("get", {}), PARIS]]
BAD = [
    [("get_weather", {})],
    [("get_weather", {"city": 5})],
    [("get_weather", {"city": "Paris", "unit": "kelvin"})],
    [("get_weather", {"city": "Paris", "days": [8]})],
    [("get_weather", {"city": "Paris", "wind": True})],
    [("get", {"city": "Paris"})],
    [("got", {})],
]


@pytest.mark.parametrize("style", STYLES)
def test_required(style: str) -> None:
    for is_parallel in (False, True):
        grammar = tool_grammar(STYLES[style], TOOLS, "required", is_parallel=is_parallel)
        for calls in GOOD:
            assert accepts(grammar, write(style, calls))
        for calls in SEVERAL:
            assert accepts(grammar, write(style, calls)) == is_parallel
        for calls in BAD:
            assert not accepts(grammar, write(style, calls))
            assert not accepts(grammar, write(style, [PARIS, *calls]))
        for text in ("", "Hello", f"So: {write(style, [PARIS])}"):
            assert not accepts(grammar, text)


@pytest.mark.parametrize("style", STYLES)
def test_named(style: str) -> None:
    grammar = tool_grammar(STYLES[style], TOOLS, "required", named="get_weather", is_parallel=False)
    assert accepts(grammar, write(style, [PARIS]))
    assert not accepts(grammar, write(style, [("get", {})]))


@pytest.mark.parametrize("style", STYLES)
def test_auto(style: str) -> None:
    """Text is free, but a call of a strict function follows its schema."""
    tools = [TOOLS[0], Tool("get_weather", "", WEATHER, is_strict=True)]
    for is_parallel in (False, True):
        grammar = tool_grammar(STYLES[style], tools, "auto", is_parallel=is_parallel)
        for text in ("", "Hello.\nIt's <b>5</b> > 4; so [f()] {x}"):
            assert accepts(grammar, text)
        for calls in GOOD:
            assert accepts(grammar, write(style, calls))
        for calls in SEVERAL:
            assert accepts(grammar, write(style, calls)) == is_parallel
        for calls in BAD[:5] + BAD[6:]:
            assert not accepts(grammar, write(style, calls))
        assert accepts(grammar, write(style, BAD[5])), "its function isn't strict"
        if style == "hermes":
            assert accepts(grammar, "Hi.\n" + write(style, [PARIS]))
            assert not accepts(grammar, "Hi.\n" + write(style, BAD[0]))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("may_reason", "is_reasoning"), [(False, False), (True, False), (False, True)])
def test_text_hides_no_calls(style: str, may_reason: bool, is_reasoning: bool) -> None:
    """What a strict tool's parser reads as a call must satisfy its schema, wherever in a text it is."""
    tools = [Tool("get_weather", "", WEATHER, is_strict=True)]
    grammar = tool_grammar(
        STYLES[style], tools, "auto", is_parallel=True, may_reason=may_reason, is_reasoning=is_reasoning
    )
    thought = "Hm.</think>" if is_reasoning else ""
    for marker in STYLES[style].parser.markers or ("[",):
        for text in (f"Sure {marker}", f"Sure.\n<{marker} ", f"Sure {marker}; {marker}\n", "Sure, "):
            text += write(style, [BAD[1][0], BAD[0][0]])
            _, calls = read(STYLES[style].parser(["get_weather"]), [text])
            assert not calls or not accepts(grammar, thought + text)
        for text in ("Sure.", "Sure" if may_reason else "<b>", f"Say {marker[:-1]}", f"{marker[1:]}x\n<"):
            assert accepts(grammar, thought + text)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_reasoning_comes_first(style: str, choice: Any) -> None:
    tools = [Tool("get_weather", "", WEATHER, is_strict=True)]
    good, bad = write(style, [PARIS]), write(style, BAD[0])
    thought = f"Hm.\n{bad} < </thin\n</think>\n\n"
    grammar = tool_grammar(STYLES[style], tools, choice, is_parallel=True, is_reasoning=True)
    assert accepts(grammar, thought + good)
    assert not accepts(grammar, thought + bad)
    assert not accepts(grammar, good)
    grammar = tool_grammar(STYLES[style], tools, choice, is_parallel=True, may_reason=True)
    assert accepts(grammar, f"<think>{thought}{good}")
    assert not accepts(grammar, f"<think>{thought}{bad}")
    assert accepts(grammar, good)
    assert not accepts(grammar, bad)


@pytest.mark.parametrize("style", STYLES)
def test_what_is_written_is_read_back(style: str) -> None:
    """Answers written at random under the grammar parse, and validate against the schemas."""
    grammar = tool_grammar(STYLES[style], TOOLS, "required", is_parallel=True)
    rng = random.Random(0)
    num_whole = 0
    for _ in range(60):
        text = write_at_random(grammar, rng)
        if text is None:
            continue
        num_whole += 1
        content, calls = read(STYLES[style].parser([tool.name for tool in TOOLS]), list(text))
        assert content == ""
        assert calls
        for name, arguments in calls:
            assert is_valid(name, json.loads(arguments)), text
    assert num_whole > 20


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "http://127.0.0.1:1/x"}, "127.0.0.1"),
        ({"$ref": "file:///etc/passwd"}, "passwd"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "frob"}, "frob"),
        ({"type": "string", "pattern": "(("}, "regex"),
        ({"type": "string", "pattern": "(?=x)y"}, "regex"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "nsatisfiable"),
        (False, "nsatisfiable"),
        (5, "5|object"),
    ],
)
def test_schemas_that_cannot_be_followed(style: str, value: Any, words: str) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": value}, "required": ["a"]})
    with pytest.raises(InvalidRequestError, match=words) as error:
        tool_grammar(STYLES[style], [TOOLS[0], tool], "required", is_parallel=True)
    assert error.value.param == "tools[1].function.parameters"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "schema",
    [
        nested(60),
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(a+)+$"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(.*a){30}"}}},
        {"type": "object", "properties": {"a": {"enum": ["x" * 50_000]}}},
        {"type": "object", "properties": {f"a{i}": {"type": "string"} for i in range(50)}},
        {"type": "object", "properties": {'a"\n %json {': {}}},
        {"type": "object", "properties": {"a": {"x-guidance": {"lenient": True}, "type": "string"}}},
        {"type": "object", "$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}}}, "properties": {}},
    ],
)
def test_hostile_schemas_are_followed_or_refused(style: str, schema: dict[str, Any]) -> None:
    """In bounded time, whatever is decided."""
    try:
        grammar = tool_grammar(STYLES[style], [Tool("f", "", schema)], "required", is_parallel=True)
    except InvalidRequestError:
        assert style == "pythonic", "JSON can hold all of these"
    else:
        assert accepts(grammar, write(style, [("f", {})]))


def test_definitions_that_every_parameter_repeats() -> None:
    """Refused before the grammar is written: with so many parameters it would have 200 million characters."""
    schema = {
        "type": "object",
        "properties": {f"a{i}": {"$ref": "#/$defs/long"} for i in range(2000)},
        "$defs": {"long": {"enum": ["x" * 50_000]}},
    }
    tracemalloc.start()
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_GRAMMAR_CHARS} characters") as error:
        tool_grammar(STYLES["pythonic"], [Tool("f", "", schema)], "required", is_parallel=False)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.value.param == "tools[0].function.parameters"
    assert most_bytes < 20_000_000


@pytest.mark.parametrize("style", STYLES)
def test_chains_of_references(style: str) -> None:
    """Each is followed by a function that calls itself: deep ones must not overflow the stack."""
    for length in (100, 2500):
        chain = {
            f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
            for i in range(length)
        }
        schema = {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/d0"}},
            "$defs": chain | {f"d{length}": {"type": "string"}},
        }
        grammar = tool_grammar(STYLES[style], [Tool("f", "", schema)], "required", is_parallel=True)
        if length == 100:
            assert accepts(grammar, write(style, [("f", {"a": {"a": {}}})]))


def test_python_needs_keywords() -> None:
    for schema in (
        {"type": "object", "anyOf": [{"required": ["a"]}]},
        {"type": "object", "properties": {"a b": {}}},
        {"type": "object", "required": ["a"]},
        {"type": "object", "properties": []},
    ):
        with pytest.raises(InvalidRequestError, match="where calls are written as Python"):
            tool_grammar(STYLES["pythonic"], [Tool("f", "", schema)], "required", is_parallel=True)


@pytest.mark.parametrize("style", STYLES)
def test_arguments_that_the_schema_does_not_name(style: str) -> None:
    """They come only where it asks for them."""
    schema = {"type": "object", "properties": {"a": {}}}
    calls = [("f", {"a": 1, "b": 2})]
    grammar = tool_grammar(STYLES[style], [Tool("f", "", schema)], "required", is_parallel=False)
    assert not accepts(grammar, write(style, calls))
    if style != "pythonic":
        tools = [Tool("f", "", {**schema, "additionalProperties": True})]
        grammar = tool_grammar(STYLES[style], tools, "required", is_parallel=False)
        assert accepts(grammar, write(style, calls))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("properties", "good", "bad"),
    [
        (
            {"a": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
            [{"a": None}, {"a": {}}, {"a": {"a": {"a": None}}}],
            [{"a": 5}, {"a": {"b": None}}],
        ),
        ({"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}, [{"b": 5}], [{"b": "x"}]),
        ({"é": {"type": "integer"}, "ö": {"$ref": "#/properties/%C3%A9"}}, [{"ö": 5}], [{"ö": "x"}]),
        (
            {"a": {"$ref": "#/$defs/k", "$defs": {"k": {"type": "string"}}}, "b": {"$ref": "#/$defs/k"}},
            [{"a": 5}, {"b": 5}],
            [{"a": "x"}, {"b": "x"}],
        ),
        (
            {"a": {"items": {"$ref": "#/properties/a/$defs/k"}, "$defs": {"k": {"type": "string"}}}},
            [{"a": ["x"]}],
            [{"a": [5]}],
        ),
        ({"a": {"$ref": "#/definitions/k/items"}}, [{"a": True}], [{"a": 5}]),
        ({"a": {"$ref": "#here"}}, [{"a": 5}], [{"a": "x"}]),
        # What only looks like a reference: data, and a property of that name.
        (
            {"a": {"enum": [{"$ref": "#"}]}, "b": {"$ref": "#"}},
            [{"a": {"$ref": "#"}}, {"b": {"a": {"$ref": "#"}}}],
            [{"a": {"$ref": "x"}}],
        ),
        (
            {"a": {"properties": {"$ref": {"const": "#"}, "enum": {"$ref": "#/$defs/k"}}}},
            [{"a": {"$ref": "#", "enum": 5}}],
            [{"a": {"$ref": "x"}}, {"a": {"enum": "x"}}],
        ),
        # A document of its own.
        (
            {"a": {"$id": "http://x/y", "$ref": "#/$defs/k", "$defs": {"k": {"type": "string"}}}},
            [{"a": "x"}],
            [{"a": 5}],
        ),
    ],
)
def test_references_within_the_schema(
    style: str, properties: dict[str, Any], good: list[dict[str, Any]], bad: list[dict[str, Any]]
) -> None:
    """They begin at the parameters, however a call is written."""
    schema = {
        "type": "object",
        "properties": properties,
        "$defs": {"k": {"$anchor": "here", "type": "integer"}},
        "definitions": {"k": {"items": {"type": "boolean"}}},
    }
    grammar = tool_grammar(STYLES[style], [Tool("f", "", schema)], "required", is_parallel=False)
    for arguments in good:
        assert accepts(grammar, write(style, [("f", arguments)])), arguments
    for arguments in bad:
        assert not accepts(grammar, write(style, [("f", arguments)])), arguments


def test_every_order_of_optional_keywords() -> None:
    schema = {
        "type": "object",
        "properties": {c: {"type": "integer"} for c in "abcd"},
        "required": ["b", "c"],
    }
    grammar = tool_grammar(STYLES["pythonic"], [Tool("f", "", schema)], "required", is_parallel=False)
    for chosen in range(16):
        names = [c for i, c in enumerate("abcd") if chosen >> i & 1]
        text = f"[f({', '.join(f'{c}=1' for c in names)})]"
        assert accepts(grammar, text) == ({"b", "c"} <= set(names))
