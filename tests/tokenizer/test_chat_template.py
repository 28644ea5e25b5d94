"""Chat templates, against transformers' own rendering."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from minivllm.errors import InvalidRequestError
from minivllm.tokenizer import chat_template as module
from minivllm.tokenizer.chat_template import ChatTemplate
from minivllm.tokenizer.tokenizer import Tokenizer

SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# The branches of Llama 3.1's template: a date that may be given, a system message that may be
# missing, tools, and tool results.
LLAMA3 = """
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

LLAMA2 = """
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}
"""

# What else templates use: loop controls, a namespace, a macro, JSON, the tag for training.
FEATURES = """
{%- macro show(message) %}[{{ message.role|upper }}]{{ message.content|tojson }}{% endmacro %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role == 'end' %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- generation %}{{ show(message) }}{% endgeneration %}
{%- endfor %}
   {% if ns.count > 1 %}
      {{ ns.count }} of {{ messages|length }}: {{ {'b': '<é&>', 'a': [1, none]}|tojson(sort_keys=true) }}
   {% endif %}
{{ missing }}{{ messages[0].nothing }}{{ dict(a=1)|tojson(indent=2, separators=(',', ': ')) }}
"""

USER = {"role": "user", "content": "  Hi, <b>'you'</b> & naïve 👍\n"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "42 °C"}

CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT, USER]]


@pytest.fixture
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both renderers see one moment, so that midnight can't fall between them."""
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

    class FixedDatetime(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> FixedDatetime:
            return cls(2026, 3, 7, 12, 30, tzinfo=tz)

    monkeypatch.setattr(module, "datetime", FixedDatetime)
    monkeypatch.setattr(chat_template_utils, "datetime", FixedDatetime)


def render(source: str, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
    template = ChatTemplate(source, SPECIAL_TOKENS)
    return template.render(messages, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("source", "conversation"),
    [
        *((source, conversation) for source in (CHATML, LLAMA3, LLAMA2) for conversation in CONVERSATIONS),
        (LLAMA3, [USER, TOOL]),
        (FEATURES, [USER, {"role": "skip", "content": "x"}, TOOL, {"role": "end", "content": "y"}, USER]),
        (FEATURES, [USER]),
    ],
)
def test_renders_as_transformers(
    fixed_time: None, source: str, conversation: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [conversation], chat_template=source, add_generation_prompt=add_generation_prompt, **SPECIAL_TOKENS
    )
    rendered = render(source, conversation, add_generation_prompt=add_generation_prompt)
    assert rendered == expected[0]
    assert "Hi" in rendered


def test_the_date_is_today() -> None:
    before = datetime.now().strftime("%d %b %Y")
    rendered = render(LLAMA3, [USER])
    after = datetime.now().strftime("%d %b %Y")
    assert f"Today Date: {before}" in rendered or f"Today Date: {after}" in rendered


def test_the_template_refuses_with_its_own_words() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"^Conversation roles must alternate user/assistant/.*\.\.\.$"
    ) as e:
        render(LLAMA2, [USER, USER])
    assert e.value.param == "messages"


def test_fields_that_are_none_count_as_left_out() -> None:
    assert render(LLAMA3, [USER | {"tool_calls": None}]) == render(LLAMA3, [USER])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].content.nothing.deeper }}", "has no attribute 'nothing'"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        (
            "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
            "it writes more than 16777216 characters",
        ),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ strftime_now(3) }}", "str"),
    ],
)
def test_what_goes_wrong_in_a_template_is_a_bad_request(source: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as e:
        render(source, [USER])
    assert str(e.value).startswith("the chat template can't render these messages: ")


@pytest.mark.parametrize(
    "source", ["{% break %}", "{{ " + "-" * 5000 + "1 }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"]
)
def test_what_jinja_takes_and_python_does_not(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="the chat template can't be compiled: "):
        ChatTemplate(source, SPECIAL_TOKENS)
    assert module.takes_tools(source) is False


@pytest.mark.parametrize("name", ["bos_token", "messages", "raise_exception"])
def test_only_a_template_s_own_variables_may_be_given(name: str) -> None:
    source = "{{ bos_token }}{{ own }}{{ raise_exception is defined }}{{ messages[0].role }}"
    template = ChatTemplate(source, SPECIAL_TOKENS)
    expected = "<|bos|>xTrueuser"
    assert template.render([USER], add_generation_prompt=True, extra={"own": "x"}) == expected
    with pytest.raises(InvalidRequestError, match=f"reads no '{name}'; it reads: own$"):
        template.render([USER], add_generation_prompt=True, extra={name: "x"})


def test_a_malformed_template_names_the_line() -> None:
    with pytest.raises(InvalidRequestError, match=r"isn't valid Jinja, line 2: .*endfor"):
        ChatTemplate("a\n{% for x in y %}", {})


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at least 1 message, got 0"):
        render(CHATML, [])


def test_a_tokenizer_without_template_says_what_to_do(sentencepiece_tokenizer: Tokenizer) -> None:
    assert sentencepiece_tokenizer.chat_template is None
    with pytest.raises(InvalidRequestError, match="--chat-template"):
        sentencepiece_tokenizer.apply_chat_template([USER])


def test_templated_text_has_one_bos(sentencepiece_tokenizer: Tokenizer) -> None:
    text = ChatTemplate(LLAMA2, sentencepiece_tokenizer.special_tokens).render(
        [USER], add_generation_prompt=True
    )
    ids = sentencepiece_tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(1) == 1
    assert sentencepiece_tokenizer.encode(text).count(1) == 2


def test_one_template_serves_several_threads(smollm: Tokenizer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def prompt(i: int) -> list[int]:
        text = smollm.apply_chat_template([{"role": "user", "content": f"number {i} é👍"}])
        return smollm.encode(text, add_special_tokens=False)

    with ThreadPoolExecutor(8) as pool:
        prompts = list(pool.map(prompt, range(200)))
    for i, ids in enumerate(prompts):
        assert f"user\nnumber {i} é👍\n" in smollm.decode(ids)
