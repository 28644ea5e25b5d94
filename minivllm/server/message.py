"""One answer's text taken apart, as it arrives: reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable

from minivllm.server.responses import ChatDelta, ChatMessage, ToolCall, ToolCallDelta
from minivllm.tools.events import Arguments, CallStarted, Content, Event, ToolCallParser
from minivllm.tools.reasoning import ReasoningSplitter


class MessageParser:
    """Words an answer as deltas. Made anew for each answer."""

    def __init__(self, reasoning: ReasoningSplitter | None, tools: ToolCallParser | None) -> None:
        self.has_calls = False
        """Whether a tool call has begun."""
        self._reasoning = reasoning
        self._tools = tools

    def push(self, text: str) -> ChatDelta:
        """What more text adds to the message; empty, where that isn't certain yet."""
        thought, text = self._reasoning.push(text) if self._reasoning else ("", text)
        return self._delta(thought, self._events(text))

    def finish(self) -> ChatDelta:
        """What was held back, when no more text comes."""
        thought, text = self._reasoning.finish() if self._reasoning else ("", "")
        events = self._events(text)
        if self._tools:
            events += self._tools.finish()
        return self._delta(thought, events)

    def _events(self, text: str) -> list[Event]:
        if self._tools is None:
            return [Content(text)] if text else []
        return self._tools.push(text)

    def _delta(self, thought: str, events: list[Event]) -> ChatDelta:
        delta: ChatDelta = {"reasoning_content": thought} if thought else {}
        content = ""
        calls: dict[int, ToolCallDelta] = {}
        for event in events:
            match event:
                case Content(text):
                    content += text
                case CallStarted(index, id, name):
                    calls[index] = {
                        "index": index,
                        "id": id,
                        "type": "function",
                        "function": {"name": name, "arguments": ""},
                    }
                    self.has_calls = True
                case Arguments(index, text):
                    calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                    calls[index]["function"]["arguments"] += text
        if content:
            delta["content"] = content
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta


def join(deltas: Iterable[ChatDelta], *, content: str | None) -> ChatMessage:
    """The message that deltas add up to, if its content begins as ``content``."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for delta in deltas:
        texts.append(delta.get("content") or "")
        thoughts.append(delta.get("reasoning_content", ""))
        for call in delta.get("tool_calls", []):
            if "id" in call:
                function = call["function"]
                calls.append(
                    {
                        "id": call["id"],
                        "type": "function",
                        "function": {"name": function["name"], "arguments": ""},
                    }
                )
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    text, thought = "".join(texts), "".join(thoughts)
    message: ChatMessage = {
        "role": "assistant",
        "content": text or content,
        "refusal": None,
    }
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message
