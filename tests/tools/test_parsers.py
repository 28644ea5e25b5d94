"""Tool-call parsers: what they find, that it doesn't depend on where the text is cut, and hostile texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.tools.events import Content
from minivllm.tools.hermes import HermesParser
from minivllm.tools.llama_json import LlamaJsonParser
from minivllm.tools.llama_pythonic import PythonicParser

from .reading import read, splits

NAMES = ["f", "get", "get_weather", "x-y"]
PARSERS = {"llama3_json": LlamaJsonParser, "pythonic": PythonicParser, "hermes": HermesParser}
PARIS = '{"city": "Paris \\"}\\" 🦙", "days": [1, {"a": null}]}'
TAG = "<|python_tag|>"

CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    # Llama JSON: calls
    ("llama3_json", f'{{"name": "get_weather", "parameters": {PARIS}}}', "", [("get_weather", PARIS)]),
    ("llama3_json", f' \n{{"name":"get","arguments":{PARIS}}}\n', "", [("get", PARIS)]),
    ("llama3_json", f'{TAG}{{"name": "f", "parameters": {{}}}}', "", [("f", "{}")]),
    ("llama3_json", f'{TAG} {{"type": "function", "name": "f", "parameters": {{}}}}', "", [("f", "{}")]),
    ("llama3_json", f'Sure.{TAG}{{"name": "f", "parameters": {{}}}}', "Sure.", [("f", "{}")]),
    ("llama3_json", f'{{"parameters": {PARIS}, "name": "f"}}', "", [("f", PARIS)]),
    ("llama3_json", '{"name": "f"}', "", [("f", "{}")]),
    (
        "llama3_json",
        '{"name": "f", "parameters": {"a": 1}}; {"name": "get", "parameters": {}};\n'
        '{"name": "f", "parameters": {}} ',
        "",
        [("f", '{"a": 1}'), ("get", "{}"), ("f", "{}")],
    ),
    ("llama3_json", '{"name": "f", "parameters": {}}; and so on', "; and so on", [("f", "{}")]),
    ("llama3_json", '{"name": "f", "parameters": {}, "id": 5}', ', "id": 5}', [("f", "{}")]),
    ("llama3_json", '{"name": "f", "parameters": {"a": "b', "", [("f", '{"a": "b')]),
    ("llama3_json", '{"name": "f", "parameters": {"a": oops}}', "", [("f", '{"a": oops}')]),
    # Llama JSON: content
    *(
        ("llama3_json", text, text, [])
        for text in [
            "",
            " \n",
            "Hello {world}",
            '{"name": "g", "parameters": {}}',
            '{"name": "Paul", "age": 5}',
            '{"name": "f", "parameters": []}',
            '{"name": "f", "parameters": "{}"}',
            '{"name": "f"',
            '{"name": "f", "name": "get"}',
            '{"parameters": {"a": "b"}}',
            '{"parameters": {"a": {"name": "f"',
            '{"parameters": {}, "arguments": {}, "name": "f"}',
            "{}",
            "{" * 100,
            f"{TAG}print(1)",
            f"a {TAG}{TAG}",
            "a <|python_ta",
            'Say {"name": "f", "parameters": {}}',
            '; {"name": "f", "parameters": {}}',
            '[{"name": "f", "parameters": {}}]',
        ]
    ),
    # Hermes: calls
    (
        "hermes",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        "",
        [("get_weather", PARIS)],
    ),
    (
        "hermes",
        'Let me see.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
        '<tool_call> {"arguments": {"a": "</tool_call>"}, "name": "get"} </tool_call>\nDone.',
        "Let me see.\n\nDone.",
        [("f", "{}"), ("get", '{"a": "</tool_call>"}')],
    ),
    ("hermes", '\n<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n</tool_c', "", [("f", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "get", "arguments": {}}</tool_call>',
        "",
        [("f", "{}"), ("get", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}} x</tool_call>', " x</tool_call>", [("f", "{}")]),
    ("hermes", '<<tool_call>{"name": "f"}</tool_call>', "<", [("f", "{}")]),
    ("hermes", '<tool_call><tool_call>{"name": "f"}</tool_call>', "<tool_call>", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call> <', " <", [("f", "{}")]),
    # Hermes: content
    *(
        ("hermes", text, text, [])
        for text in [
            "",
            "\n",
            "a < b <tool",
            "<tool_call>",
            "<tool_call>{</tool_call>",
            '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "f", "arguments": null}</tool_call>',
            '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>',
            '{"name": "f", "arguments": {}}',
            "<tool_call>" * 20,
            "<" * 100,
        ]
    ),
    # Python: calls
    ("pythonic", "[f()]", "", [("f", "{}")]),
    (
        "pythonic",
        "\n[get_weather(city='Paris \"}\" 🦙', days=[1, {'a': None},]), x-y( a = -1.5e3 ,b=True, )] ",
        "",
        [
            ("get_weather", '{"city": "Paris \\"}\\" 🦙", "days": [1, {"a": null}]}'),
            ("x-y", '{"a": -1.5e3, "b": true}'),
        ],
    ),
    ("pythonic", '[f(a="\\u00e9\\x41\\\'\\q\\\n")]', "", [("f", '{"a": "\\u00e9A\'\\\\q"}')]),
    ("pythonic", "[f(a=1)] so", " so", [("f", '{"a": 1}')]),
    ("pythonic", "[f(a=1, oops)]", ", oops)]", [("f", '{"a": 1')]),
    ("pythonic", "[f(a=oops)]", "oops)]", [("f", '{"a": ')]),
    ("pythonic", "[f(a=__import__('os'))]", "__import__('os'))]", [("f", '{"a": ')]),
    ("pythonic", "[f(a=1), g()]", ", g()]", [("f", '{"a": 1}')]),
    ("pythonic", "[f(a='b", "", [("f", '{"a": "b')]),
    ("pythonic", "[f(a=12", "", [("f", '{"a": 12')]),
    ("pythonic", "[f(a=1 2)]", "2)]", [("f", '{"a": 1')]),
    ("pythonic", "[f(a=(1,2))]", "(1,2))]", [("f", '{"a": ')]),
    ("pythonic", '[f(a="\\U00110000x")]', '\\U00110000x")]', [("f", '{"a": "')]),
    ("pythonic", '[f(a="\\u12g")]', '\\u12g")]', [("f", '{"a": "')]),
    ("pythonic", f"[f(a={'12345' * 81})]", f"{'12345' * 81})]", [("f", '{"a": ')]),
    ("pythonic", f"[f(a={'12345' * 80})]", "", [("f", f'{{"a": {"12345" * 80}}}')]),
    # Python: content
    *(
        ("pythonic", text, text, [])
        for text in [
            "",
            "[]",
            "[1, 2]",
            "[f",
            "[f(",
            "[f(a",
            "[f(1)]",
            "[f(a b=1)]",
            "[g()]",
            "[fg()]",
            "f()",
            "Call [f()]",
            "[" * 100,
        ]
    ),
]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), CASES)
def test_every_split(kind: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for pieces in splits(text):
        assert read(PARSERS[kind](NAMES), pieces) == (content, calls)


ARGUMENTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)
SEEDS = st.integers(0, 1000)


@settings(max_examples=40)
@given(calls=CALLS, indent=st.sampled_from([None, 2]), ascii=st.booleans(), seed=SEEDS)
@pytest.mark.parametrize("kind", ["llama3_json", "hermes"])
def test_json_calls(kind: str, calls: Any, indent: int | None, ascii: bool, seed: int) -> None:
    """What ``json`` writes comes back, to the character."""
    word = "arguments" if kind == "hermes" else "parameters"
    texts = [
        json.dumps({"name": name, word: arguments}, ensure_ascii=ascii, indent=indent)
        for name, arguments in calls
    ]
    if kind == "hermes":
        text = "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    else:
        text = ";\n".join(texts)
    for pieces in splits(text, seed) if len(text) < 80 else ([text], list(text)):
        content, found = read(PARSERS[kind](NAMES), pieces)
        assert content == ""
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls


KEYWORDS = st.dictionaries(
    st.text("abcdé_", min_size=1, max_size=5),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


@settings(max_examples=40)
@given(calls=st.lists(st.tuples(st.sampled_from(NAMES), KEYWORDS), min_size=1, max_size=3), seed=SEEDS)
def test_python_calls(calls: Any, seed: int) -> None:
    """What ``repr`` writes comes back as the same values."""
    text = ", ".join(f"{name}({', '.join(f'{k}={v!r}' for k, v in kw.items())})" for name, kw in calls)
    for pieces in splits(f"[{text}]", seed) if len(text) < 80 else ([f"[{text}]"], f"[{text}]"):
        content, found = read(PythonicParser(NAMES), pieces)
        assert content == ""
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls


PIECES = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<",
        TAG,
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        '"',
        "'",
        "\\",
        ",",
        ":",
        ";",
        "=",
    ),
    *(
        " ",
        "\n",
        "name",
        '"name": "f"',
        '"arguments": {',
        '"parameters": {',
        "f(",
        "a=",
        "1",
        "True",
        "hello",
        '[f(a="\\U00110000',
    ),
]


@given(parts=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25), seed=SEEDS)
@pytest.mark.parametrize("kind", PARSERS)
def test_any_text(kind: str, parts: list[str], seed: int) -> None:
    """Cuts change nothing, and a text without calls, or after a call that failed, is content as it was."""
    text = "".join(parts)
    whole = read(PARSERS[kind](NAMES), [text])
    for pieces in splits(text, seed):
        assert read(PARSERS[kind](NAMES), pieces) == whole
    if not whole[1]:
        assert whole[0] == text
    if kind == "pythonic":
        assert text.endswith(whole[0])


@pytest.mark.parametrize("kind", PARSERS)
def test_content_is_not_held_back(kind: str) -> None:
    parser = PARSERS[kind](NAMES)
    for char in "Hi, 1 [f()] {":
        (event,) = parser.push(char)
        assert event.text == char  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "start", "more"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {', '"a": "Paris"'),
        ("llama3_json", '{"name": "f", "parameters": {', '"a": "Paris"'),
        ("pythonic", "[f(a=", "'Paris'"),
    ],
)
def test_arguments_are_not_held_back(kind: str, start: str, more: str) -> None:
    parser = PARSERS[kind](NAMES)
    assert len(parser.push(start)) == 2
    for char in more:
        assert len(parser.push(char)) == 1


def test_a_keyword_without_end_is_not_held_back() -> None:
    text = "[f(" + "a" * 300
    events = PythonicParser(NAMES).push(text)
    assert "".join(event.text for event in events if isinstance(event, Content)) == text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("pythonic", "[f(a=" + "[" * 100_000),
        ("pythonic", "[f(a=" + "{'a':" * 100_000),
        ("pythonic", "[f(a=" + "9" * 100_000),
        ("pythonic", "[f(" + "a" * 100_000),
        ("pythonic", "[f(a='" + "\\" * 100_000),
        ("pythonic", "[" + "f" * 100_000),
        ("pythonic", "[f(a='\\U99999999" + "x" * 100_000),
        ("hermes", "<tool_call>" * 10_000),
        ("hermes", '<tool_call>{"arguments": {' * 5000),
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + "{" * 100_000),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}' + "\n" * 100_000 + "</tool_cal" * 10_000),
        ("llama3_json", '{"parameters": {"a": "' + "b" * 100_000),
        ("llama3_json", '{"parameters": ' + '{"a":' * 50_000),
        ("llama3_json", '{"name": "' + "f" * 100_000),
        ("llama3_json", " " * 100_000 + "{"),
        ("llama3_json", TAG * 10_000),
    ],
)
def test_hostile_texts(kind: str, text: str) -> None:
    """They end, without an error, and the same in pieces."""
    whole = read(PARSERS[kind](NAMES), [text])
    assert read(PARSERS[kind](NAMES), [text[i : i + 1000] for i in range(0, len(text), 1000)]) == whole
    if not whole[1]:
        assert whole[0] == text
