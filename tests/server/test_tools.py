"""Tools in ``/v1/chat/completions``: requests, prompts, answers, streams, and the ``openai`` package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from minivllm.config import ServerConfig
from minivllm.request import SamplingParams
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.tools.style import STYLES, style_of_template

from ..tools.llg import accepts
from .fakes import EOS, MODEL, FakeEngine, RunningServer, make_tokenizer, run_server
from .test_bad_requests import says

TOOLS_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_call_id }}{{ m.name }}"
    "{% for call in m.tool_calls %}{{ call.id }} {{ call.function.name }} {{ call.function.arguments.city }}"
    "{% endfor %}{{ '\n' }}{% endfor %}assistant: "
)
"""Shows tools, in no format that is known."""
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}assistant: "
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
STRICT = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
TOOLS = [WEATHER, CLOCK]
USER = {"role": "user", "content": "Hi"}
PARIS, OSLO = '{"city": "Paris 🦙"}', '{"city": "Oslo"}'
HERMES = (
    f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call>'
)


class SayingEngine(FakeEngine):
    """Says what it is told to."""

    text = ""

    def _answer(self, sampling: SamplingParams) -> list[int]:
        return self._tokenizer.encode(self.text + EOS)


@contextmanager
def serving(template: str, **flags: Any) -> Iterator[RunningServer]:
    tokenizer = make_tokenizer(template)
    engine = SayingEngine(tokenizer)
    engine.info = replace(engine.info, max_model_len=4000)
    app = create_app(engine, tokenizer, ServerConfig(**flags), MODEL, ServerState())
    with run_server(app) as port:
        server = RunningServer(engine, port)
        yield server
        server.close()


@pytest.fixture(scope="module")
def hermes() -> Iterator[RunningServer]:
    with serving(TOOLS_TEMPLATE, tool_call_parser="hermes") as server:
        yield server


@pytest.fixture(scope="module")
def thinking() -> Iterator[RunningServer]:
    with serving(TOOLS_TEMPLATE, tool_call_parser="hermes", reasoning_parser="think") as server:
        yield server


def grammars(server: RunningServer) -> list[str]:
    """The grammars that answers had to follow."""
    return [
        sampling.grammar for _, sampling in server.engine.requests.values() if sampling.grammar is not None
    ]


def ask(server: RunningServer, text: str, **fields: Any) -> dict[str, Any]:
    """The answer's choice, after a check that its stream adds up to the same."""
    server.engine.text = text  # type: ignore[attr-defined]
    server.engine.requests.clear()
    body = {"messages": [USER], **fields}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert streamed(server, body) == without_ids(choice)
    return choice


def streamed(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    """The choice that a stream's chunks add up to."""
    response = server.http.post("/v1/chat/completions", json={**body, "stream": True})
    *blocks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    message: dict[str, Any] = {"refusal": None}
    reason = None
    for block in blocks:
        (choice,) = json.loads(block.removeprefix("data: "))["choices"]
        assert reason is None
        reason, delta = choice["finish_reason"], choice["delta"]
        assert delta or choice["logprobs"] or reason or not body.get("tools")
        for call in delta.pop("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                assert call["id"].startswith("call_")
                assert call["type"] == "function"
                calls.append(
                    {"type": "function", "function": {"name": call["function"]["name"], "arguments": ""}}
                )
            else:
                assert call.keys() == {"index", "function"}
                assert call["function"].keys() == {"arguments"}
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        for key, value in delta.items():
            message[key] = value if message.get(key) is None else message[key] + value
    return {"message": message, "finish_reason": reason}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    message = json.loads(json.dumps(choice["message"]))
    for call in message.get("tool_calls", []):
        assert call.pop("id").startswith("call_")
    return {"message": message, "finish_reason": choice["finish_reason"]}


def calls(choice: dict[str, Any]) -> list[tuple[str, str]]:
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    return [(function["name"], function["arguments"]) for function in functions]


def prompt(server: RunningServer) -> str:
    ids, _ = next(iter(server.engine.requests.values()))
    return bytes(ids).decode()


def test_calls(hermes: RunningServer) -> None:
    choice = ask(hermes, HERMES, tools=TOOLS)
    assert calls(choice) == [("get_weather", PARIS), ("clock", "{}")]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    clock = {
        "type": "function",
        "function": {**CLOCK["function"], "description": "", "parameters": NO_PARAMETERS},
    }
    assert prompt(hermes) == f"tools: {json.dumps([WEATHER, clock])}\nuser: Hi\nassistant: "


def test_text_beside_calls(hermes: RunningServer) -> None:
    choice = ask(hermes, f"Let me see. {HERMES}", tools=TOOLS)
    assert choice["message"]["content"] == "Let me see. "
    assert len(calls(choice)) == 2
    choice = ask(hermes, "No <tool_call>, sorry", tools=TOOLS)
    assert choice["message"]["content"] == "No <tool_call>, sorry"
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    assert ask(hermes, "", tools=TOOLS)["message"]["content"] is None


def test_calls_are_text_where_there_are_no_tools(hermes: RunningServer) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = ask(hermes, HERMES, **fields)
        assert choice["message"]["content"] == HERMES
        assert prompt(hermes) == "user: Hi\nassistant: "


def test_cut_off(hermes: RunningServer) -> None:
    choice = ask(hermes, HERMES, tools=TOOLS, max_tokens=60)
    assert choice["finish_reason"] == "length"
    ((name, arguments),) = calls(choice)
    assert name == "get_weather"
    assert PARIS.startswith(arguments)
    choice = ask(hermes, HERMES, tools=TOOLS, stop="🦙")
    assert calls(choice) == [("get_weather", '{"city": "Paris ')]


def test_n_logprobs_and_usage(hermes: RunningServer) -> None:
    hermes.engine.text = HERMES  # type: ignore[attr-defined]
    body = {"messages": [USER], "tools": TOOLS, "n": 2, "logprobs": True}
    whole = hermes.http.post("/v1/chat/completions", json=body).json()
    assert [calls(choice) for choice in whole["choices"]] == [[("get_weather", PARIS), ("clock", "{}")]] * 2
    ids = [call["id"] for choice in whole["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 4
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    blocks = hermes.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    assert chunks[-1]["usage"] == whole["usage"]
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        entries = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert entries == whole["choices"][index]["logprobs"]["content"]
        text = "".join(c["function"]["arguments"] for x in choices for c in x["delta"].get("tool_calls", []))
        assert text == PARIS + "{}"


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (
            "llama3_json",
            f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "clock", "parameters": {{}}}}',
        ),
        ("pythonic", "[get_weather(city='Paris 🦙'), clock()]"),
        ("hermes", HERMES),
    ],
)
def test_openai_package(parser: str, text: str) -> None:
    """Its accumulated stream has the same calls as the whole answer, and both can be sent back."""
    with serving(TOOLS_TEMPLATE, tool_call_parser=parser) as server:
        server.engine.text = text  # type: ignore[attr-defined]
        fields: Any = {"model": MODEL, "messages": [USER], "tools": TOOLS}
        whole = server.openai.chat.completions.create(**fields).choices[0]
        with server.openai.chat.completions.stream(**fields) as stream:
            final = stream.get_final_completion().choices[0]
        for choice in (whole, final):
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
            found = [
                (call.function.name, call.function.arguments) for call in choice.message.tool_calls or []
            ]
            assert found == [("get_weather", PARIS), ("clock", "{}")]
        for message in (whole.message.model_dump(), final.message.model_dump()):
            results = [
                {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
                for call in message["tool_calls"]
            ]
            server.engine.requests.clear()
            server.openai.chat.completions.create(**fields | {"messages": [USER, message, *results]})
            first, second = (call["id"] for call in message["tool_calls"])
            assert prompt(server).endswith(
                f"assistant: {first} get_weather Paris 🦙{second} clock \n"
                f"tool: rain{first}get_weather\ntool: rain{second}clock\nassistant: "
            )


def test_reasoning(thinking: RunningServer) -> None:
    choice = ask(thinking, f"<think>\nHm. {HERMES}\n</think>\n\n{HERMES}", tools=TOOLS)
    assert choice["message"]["reasoning_content"] == f"Hm. {HERMES}"
    assert choice["message"]["content"] is None
    assert len(calls(choice)) == 2
    choice = ask(thinking, "<think>Hm.</think>Yes.")
    assert choice["message"]["reasoning_content"] == "Hm."
    assert choice["message"]["content"] == "Yes."
    choice = ask(thinking, "<think>Hm.", max_tokens=9)
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "Hm",
    }
    assert ask(thinking, "Yes.")["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}


def test_reasoning_that_the_prompt_opens() -> None:
    with serving(PLAIN_TEMPLATE + "<think>\n") as server:
        assert ask(server, "Yes.")["message"]["reasoning_content"] == "Yes."
    template = "{# </think> #}{% for m in messages %}{{ m.reasoning_content }}{% endfor %}<think>\n"
    with serving(template) as server:
        choice = ask(
            server,
            "Hm.</think>Yes.",
            messages=[USER, {"role": "assistant", "content": "x", "reasoning_content": "Ah."}],
        )
        assert choice["message"]["reasoning_content"] == "Hm."
        assert choice["message"]["content"] == "Yes."
        assert prompt(server) == "Ah.<think>", "Jinja drops a last line break"
    with serving(template, reasoning_parser="none") as server:
        assert ask(server, "Hm.</think>Yes.")["message"]["content"] == "Hm.</think>Yes."


def test_special_tokens_are_shown_to_the_parser() -> None:
    """A tag that is a special token is hidden from text, but not from who looks for it."""
    tokenizer = make_tokenizer(TOOLS_TEMPLATE)
    tokenizer._backend.add_special_tokens(["<tool_call>", "</tool_call>", "<other>"])
    tokenizer = type(tokenizer)(
        tokenizer._backend, special_tokens=tokenizer.special_tokens, chat_template=TOOLS_TEMPLATE
    )
    engine = SayingEngine(tokenizer)
    engine.info = replace(engine.info, max_model_len=4000)
    app = create_app(engine, tokenizer, ServerConfig(tool_call_parser="hermes"), MODEL, ServerState())
    with run_server(app) as port:
        server = RunningServer(engine, port)
        choice = ask(server, f"a<other>b{HERMES}", tools=TOOLS)
        assert len(calls(choice)) == 2
        assert choice["message"]["content"] == "ab"
        assert "<tool_call>" not in ask(server, HERMES)["message"]["content"]
        server.close()


def test_a_call_without_arguments_in_history(hermes: RunningServer) -> None:
    """Clients that add up the deltas of a function without parameters may have no text at all."""
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": ""}}
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
    ]
    assert ask(hermes, "Noon.", messages=history)["message"]["content"] == "Noon."


def test_no_grammar_where_the_model_is_free(hermes: RunningServer) -> None:
    for fields in (
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [STRICT], "tool_choice": "none"},
    ):
        ask(hermes, HERMES, **fields)
        assert grammars(hermes) == []


@pytest.mark.parametrize(
    ("fields", "accepted", "refused"),
    [
        ({"tool_choice": "required"}, [("get_weather", OSLO), ("clock", "{}")], ["Hi", "[]"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [("clock", "{}")], ["Hi"]),
        (
            {"tool_choice": {"type": "function", "function": {"name": "clock"}}},
            [("clock", "{}")],
            ["Hi", f'<tool_call>\n{{"name": "get_weather", "arguments": {OSLO}}}\n</tool_call>'],
        ),
        ({"parallel_tool_calls": False}, [("clock", '{"a": 5}')], [HERMES]),
        (
            {"tools": [STRICT, CLOCK]},
            [("get_weather", OSLO), ("clock", '{"a": 5}')],
            ['<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'],
        ),
    ],
)
def test_grammars(
    hermes: RunningServer,
    fields: dict[str, Any],
    accepted: list[tuple[str, str]],
    refused: list[str],
) -> None:
    text = "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in accepted
    )
    assert calls(ask(hermes, text, **{"tools": TOOLS, **fields})) == accepted
    grammar = grammars(hermes)[0]
    assert accepts(grammar, text)
    assert not any(accepts(grammar, other) for other in refused)


def test_grammar_after_reasoning(thinking: RunningServer) -> None:
    ask(thinking, HERMES, tools=TOOLS, tool_choice="required")
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert accepts(grammars(thinking)[0], f"<think>\nHm.\n</think>\n\n{call}")
    assert accepts(grammars(thinking)[0], call)


def test_template_without_tools() -> None:
    """The model is told of tools in words, in Hermes' format, and sees its own calls again."""
    with serving(PLAIN_TEMPLATE) as server:
        assert len(calls(ask(server, HERMES, tools=TOOLS))) == 2
        text = prompt(server)
        assert text.startswith("system: You can call these functions")
        assert '"name": "get_weather"' in text
        assert "To call a function, answer in exactly this form:\n<tool_call>\n" in text
        assert text.endswith("\nuser: Hi\nassistant: ")
        choice = ask(
            server,
            HERMES,
            tools=[CLOCK],
            tool_choice="required",
            messages=[{"role": "system", "content": "Be brief."}, USER],
        )
        assert len(calls(choice)) == 1, "the other one is not among the tools"
        assert prompt(server).startswith("system: Be brief.\n\nYou can call these functions")
        assert len(grammars(server)) == 2
        history = [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call("get_weather", OSLO), call("clock", "{}")],
            },
            {"role": "tool", "tool_call_id": "x", "content": "rain"},
        ]
        ask(server, "Rain.", messages=history)
        assert prompt(server) == (
            "user: Hi\nassistant: "
            f'<tool_call>\n{{"name": "get_weather", "arguments": {OSLO}}}\n</tool_call>\n'
            '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\ntool: rain\nassistant: '
        )


def test_text_before_calls_is_kept_in_words() -> None:
    calling = {"role": "assistant", "content": "Let me see.", "tool_calls": [call("clock", "{}")]}
    with serving(PLAIN_TEMPLATE) as server:
        ask(server, "Noon.", messages=[USER, calling])
        assert prompt(server) == (
            "user: Hi\nassistant: Let me see.\n"
            '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\nassistant: '
        )


def test_a_tool_message_keeps_its_own_name(hermes: RunningServer) -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": [call("clock", "{}")]}
    result = {"role": "tool", "tool_call_id": "x", "content": "noon"}
    for named, name in ((result, "clock"), (result | {"name": "sundial"}, "sundial")):
        ask(hermes, "Noon.", messages=[USER, calling, named])
        assert prompt(hermes).endswith(f"tool: noonx{name}\nassistant: ")


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "x", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_no_parser() -> None:
    for flags, words in (
        ({}, "this model's chat template doesn't say in a known way"),
        ({"tool_call_parser": "none"}, "started with --tool-call-parser none"),
    ):
        with serving(TOOLS_TEMPLATE, **flags) as server:
            for choice in ("auto", "required"):
                body = {"messages": [USER], "tools": TOOLS, "tool_choice": choice}
                says(server.http.post("/v1/chat/completions", json=body), 400, "tools", words)
            assert ask(server, HERMES, tools=TOOLS, tool_choice="none")["message"]["content"] == HERMES


@pytest.mark.parametrize(
    ("template", "takes_tools", "style"),
    [
        (None, False, "hermes"),
        ("{{ messages }}", False, "hermes"),
        ("{{ tools }} <tool_call>", True, "hermes"),
        ('{{ tools }} {"name": function name, "parameters": dictionary}', True, "llama3_json"),
        ("{{ tools }} <|python_tag|>", True, "llama3_json"),
        ("{{ tools }} [func_name1(params_name1=params_value1), func_name2()]", True, "pythonic"),
        ("{{ tools }}", True, None),
    ],
)
def test_style_of_template(template: str | None, takes_tools: bool, style: str | None) -> None:
    found = style_of_template(template, takes_tools=takes_tools)
    assert found is (None if style is None else STYLES[style])
    if template is not None:
        assert make_tokenizer(template).chat_template_takes_tools == takes_tools


def test_templates_that_set_tools_themselves() -> None:
    for template in (
        "{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}{{ tools }}",
        "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{% if tools %}x{% endif %}",
    ):
        assert make_tokenizer(template).chat_template_takes_tools
    for template in (None, "no tools here", "{# tools #}", "{{ broken", "{% set tools = 1 %}{{ tools }}"):
        assert not make_tokenizer(template).chat_template_takes_tools


LONG = "x" * 100_000
NOT = {"type": "object", "properties": {"a": {"not": {}}}}
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(40):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": []}, "tools", "a list of at least 1, got []"),
        ({"tools": {}}, "tools", "must be a list, got {}"),
        ({"tools": [function(name=f"f{i}") for i in range(129)]}, "tools", "a list of at most 128"),
        ({"tools": ["f"]}, "tools[0]", "must be an object, got 'f'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function', got 'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is required"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type", "is required"),
        ({"tools": [function(name=None)]}, "tools[0].function.name", "is required"),
        ({"tools": [function(name="")]}, "tools[0].function.name", "1 to 64 characters"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name", "got 'a b'"),
        ({"tools": [function(name="é")]}, "tools[0].function.name", "A-Z, a-z"),
        ({"tools": [function(name="f" * 65)]}, "tools[0].function.name", "of 65"),
        ({"tools": [function(name=LONG)]}, "tools[0].function.name", "of 100000"),
        ({"tools": [function(), function()]}, "tools[1].function.name", "'f' twice"),
        ({"tools": [function(description=5)]}, "tools[0].function.description", "a string, got 5"),
        ({"tools": [function(strict="yes")]}, "tools[0].function.strict", "true or false, got 'yes'"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "must be an object, got []"),
        (
            {"tools": [function(parameters={"type": "string"})]},
            "tools[0].function.parameters.type",
            "got 'string'",
        ),
        (
            {"tools": [function(parameters={"properties": {}})]},
            "tools[0].function.parameters.type",
            "got 'None'",
        ),
        ({"tools": [function(parameters=DEEP)]}, "tools[0].function.parameters", "at most 64 deep, got 81"),
        ({"tools": [function(arguments={})]}, "tools[0].function.arguments", "unknown field 'arguments'"),
        (
            {"tools": [CLOCK, function(parameters=NOT)], "tool_choice": "required"},
            "tools[1].function.parameters",
            "not",
        ),
        ({"tools": [function(parameters=NOT, strict=True)]}, "tools[0].function.parameters", "not"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tools",
            "can't follow both",
        ),
        ({"tool_choice": "auto"}, "tool_choice", "only allowed with tools"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "only allowed with tools"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false, got 1"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "got 'any'"),
        ({"tools": TOOLS, "tool_choice": 5}, "tool_choice", "an object that names a function, got 5"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
            "must name one of the tools, got 'g'",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "use 'tools' instead"),
        ({"function_call": "auto"}, "function_call", "use 'tool_choice' instead"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "is required"),
        (
            {"messages": [{**USER, "tool_calls": [call("f", "{}")]}]},
            "messages[0].tool_calls",
            "role assistant",
        ),
        (
            {"messages": [{**USER, "reasoning_content": "x"}]},
            "messages[0].reasoning_content",
            "role assistant",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call("f", "{")]}]},
            "messages[0].tool_calls[0].function.arguments",
            "must be a JSON object: EOF",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call("f", f'"{LONG}"')]}]},
            "messages[0].tool_calls[0].function.arguments",
            "must be a JSON object, got",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {}}]},
            "messages[0].function_call",
            "use 'tool_calls' instead",
        ),
    ],
)
def test_bad_requests(hermes: RunningServer, fields: dict[str, Any], param: str, words: str) -> None:
    hermes.engine.requests.clear()
    response = hermes.http.post("/v1/chat/completions", json={"messages": [USER], **fields})
    says(response, 400, param, words)
    assert not hermes.engine.requests
