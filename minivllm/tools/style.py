"""The formats in which models write tool calls, and which of them a chat template asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minivllm.tools.events import ToolCallParser
from minivllm.tools.hermes import HermesParser
from minivllm.tools.llama_json import LlamaJsonParser
from minivllm.tools.llama_pythonic import PythonicParser


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """One format."""

    name: str
    """As ``--tool-call-parser`` has it."""
    parser: type[ToolCallParser]
    pattern: str
    """A call as it is explained to a model that doesn't know the format."""
    separator: str
    """Between calls."""
    write: Callable[[str, Mapping[str, Any]], str]
    """A call of a function with arguments, as text."""


def _write_hermes(name: str, arguments: Mapping[str, Any]) -> str:
    return f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"


def _write_llama_json(name: str, arguments: Mapping[str, Any]) -> str:
    return _json({"name": name, "parameters": arguments})


def _write_pythonic(name: str, arguments: Mapping[str, Any]) -> str:
    return f"[{name}({', '.join(f'{keyword}={value!r}' for keyword, value in arguments.items())})]"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


HERMES = ToolStyle(
    "hermes",
    HermesParser,
    '<tool_call>\n{"name": <function name>, "arguments": <arguments as a JSON object>}\n</tool_call>',
    "\n",
    _write_hermes,
)
LLAMA_JSON = ToolStyle(
    "llama3_json",
    LlamaJsonParser,
    '{"name": <function name>, "parameters": <arguments as a JSON object>}',
    "; ",
    _write_llama_json,
)
PYTHONIC = ToolStyle(
    "pythonic",
    PythonicParser,
    "[<function name>(<argument name>=<value>, ...)]",
    "\n",
    _write_pythonic,
)
STYLES = {style.name: style for style in (HERMES, LLAMA_JSON, PYTHONIC)}
"""By name."""


def style_of_template(template: str | None, *, takes_tools: bool) -> ToolStyle | None:
    """The format that a chat template's text asks for; None where it shows tools in one that isn't known.

    A template without tools (``takes_tools`` false) leaves the choice to us: Hermes', the only one that
    can't be mistaken for an answer in text.
    """
    if template is None or not takes_tools or "<tool_call>" in template:
        return HERMES
    if "[func_name" in template:  # as in "[func_name1(params_name1=params_value1, …), func_name2(params)]"
        return PYTHONIC
    if "<|python_tag|>" in template or '"parameters":' in template:
        return LLAMA_JSON
    return None
