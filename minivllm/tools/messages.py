"""Messages put right for the chat template: what it can't show is said in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minivllm.tools.style import ToolStyle
from minivllm.tools.tool import Choice, Tool

Message = Mapping[str, Any]


def with_instruction(
    messages: Sequence[Message], tools: Sequence[Tool], choice: Choice, style: ToolStyle
) -> list[Message]:
    """The messages, with a system message, or more in theirs, that lists ``tools`` and the form."""
    listed = "\n".join(json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools)
    when = "To call a function, answer" if choice == "auto" else "Call a function: answer"
    text = (
        f"You can call these functions, described as JSON schemas:\n{listed}\n\n"
        f"{when} in exactly this form:\n{style.pattern}"
    )
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, *messages]


def with_names(messages: Sequence[Message]) -> list[Message]:
    """The messages, those of tools with the name of the function that was called: some templates want it."""
    names: dict[str, str] = {}
    named: list[Message] = []
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", [])}
        name = names.get(message.get("tool_call_id", ""))
        named.append(message if name is None or "name" in message else {**message, "name": name})
    return named


def with_calls_as_text(messages: Sequence[Message], style: ToolStyle) -> list[Message]:
    """The messages, with the calls that the model made earlier as it wrote them."""
    return [
        _with_calls_as_text(message, style) if "tool_calls" in message else message for message in messages
    ]


def _with_calls_as_text(message: Message, style: ToolStyle) -> Message:
    functions = [call["function"] for call in message["tool_calls"]]
    calls = style.separator.join(
        style.write(function["name"], function["arguments"]) for function in functions
    )
    content = f"{message['content']}\n{calls}" if message["content"] else calls
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
