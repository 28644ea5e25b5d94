"""What clients may send of a conversation: messages, their text parts, and how many of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from minivllm.errors import InvalidRequestError
from minivllm.server.strict import StrictModel
from minivllm.server.tool_protocol import ToolCall

MAX_MESSAGES = 16_384
"""Most messages of one request, their text parts and tool calls counted with them."""


def kind_of_text_or_list(value: Any) -> str | None:
    """The branch of a union of the two that an error is about."""
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


class TextPart(StrictModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, data: Any) -> Any:
        # Before the names are checked: an image is refused for what it is, not for its fields.
        kind = data.get("type", "text") if isinstance(data, dict) else "text"
        if isinstance(kind, str) and kind != "text":
            raise InvalidRequestError(
                f"only text is supported: type must be 'text', got {kind[:80]!r}", param="type"
            )
        return data


class ChatMessage(StrictModel):
    """One message. What a role means, and whether it is allowed, is up to the model's chat template."""

    unsupported = frozenset({"annotations", "audio", "reasoning", "refusal"})
    replaced: ClassVar[Mapping[str, str]] = {"function_call": "tool_calls"}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("<list>")],
            Discriminator(
                kind_of_text_or_list,
                custom_error_type="expected",
                custom_error_message="a string or a list of text parts",
            ),
        ]
        | None
    ) = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise InvalidRequestError(
                f"content is required in a message of role {self.role}", param="content"
            )
        for name in ("tool_calls", "reasoning_content"):
            if getattr(self, name) and self.role != "assistant":
                raise InvalidRequestError(
                    f"{name} is only allowed in a message of role assistant, got {self.role!r}", param=name
                )
        if self.role == "tool" and self.tool_call_id is None:
            raise InvalidRequestError(
                "tool_call_id is required in a message of role tool", param="tool_call_id"
            )
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it, its content one string."""
        if isinstance(self.content, list):
            content = "\n".join(part.text for part in self.content)
        else:
            content = self.content or ""
        extra = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
            "tool_calls": [call.for_template() for call in self.tool_calls or []] or None,
        }
        return {"role": self.role, "content": content} | {k: v for k, v in extra.items() if v is not None}


def _count_messages(messages: Any) -> Any:
    # Before any is validated: all of a large body's take seconds, in which nobody else is served.
    if isinstance(messages, list):
        inner = (m.get(name) for m in messages if isinstance(m, dict) for name in ("content", "tool_calls"))
        count = len(messages) + sum(len(items) for items in inner if isinstance(items, list))
        if count > MAX_MESSAGES:
            raise InvalidRequestError(
                f"messages, with their text parts and tool calls, must be at most {MAX_MESSAGES}, got {count}"
            )
    return messages


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), BeforeValidator(_count_messages)]
