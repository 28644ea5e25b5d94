"""What clients may send of tools: the functions, the choice among them, and calls made earlier."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import from_json

from minivllm.errors import InvalidRequestError
from minivllm.server.strict import StrictModel
from minivllm.structured import MAX_SCHEMA_DEPTH, nesting_depth
from minivllm.tools.tool import Tool

MAX_TOOLS = 128
MAX_NAME_CHARS = 64
"""Objects and lists inside each other in a function's parameters."""

_NAME_CHARS = frozenset(string.ascii_letters + string.digits + "_-")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= MAX_NAME_CHARS or not _NAME_CHARS.issuperset(name):
        raise InvalidRequestError(
            f"a function's name must be 1 to {MAX_NAME_CHARS} characters of A-Z, a-z, 0-9, _ and -, "
            f"got {name[:80]!r}" + (f" of {len(name)}" if len(name) > MAX_NAME_CHARS else ""),
            param="name",
        )


class Function(StrictModel):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema. Left out: there are none."""
    strict: bool = False
    """Whether arguments must follow the schema also with tool_choice "auto"."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_name(self.name)
        if self.parameters:
            kind = self.parameters.get("type")
            if kind != "object":
                raise InvalidRequestError(
                    f"parameters must be a schema of type 'object', got {str(kind)[:80]!r}",
                    param="parameters.type",
                )
            depth = nesting_depth(self.parameters)
            if depth > MAX_SCHEMA_DEPTH:
                raise InvalidRequestError(
                    f"parameters must be nested at most {MAX_SCHEMA_DEPTH} deep, got {depth}",
                    param="parameters",
                )
        return self


class FunctionTool(StrictModel):
    """The one kind of tool there is."""

    type: Literal["function"]
    function: Function

    def as_tool(self) -> Tool:
        """The tool, its parameters a schema in any case."""
        function = self.function
        parameters = function.parameters or _NO_PARAMETERS
        return Tool(function.name, function.description or "", parameters, function.strict)


class FunctionName(StrictModel):
    """Which function."""

    name: str


class NamedTool(StrictModel):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


def _kind_of_choice(value: Any) -> str | None:
    return "<word>" if isinstance(value, str) else "<tool>" if isinstance(value, dict) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedTool, Tag("<tool>")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="expected",
        custom_error_message="'none', 'auto', 'required' or an object that names a function",
    ),
]

Tools = Annotated[list[FunctionTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class ToolFields(StrictModel):
    """The fields of a chat request that are about tools."""

    replaced: ClassVar[Mapping[str, str]] = {"functions": "tools", "function_call": "tool_choice"}

    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    """Left out: auto."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may hold several calls. Left out: true."""

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        if self.tools is None:
            for name in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, name) is not None:
                    raise InvalidRequestError(f"{name} is only allowed with tools", param=name)
            return self
        names = [tool.function.name for tool in self.tools]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise InvalidRequestError(
                    f"the names of tools must differ, got {name!r} twice", param=f"tools[{i}].function.name"
                )
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise InvalidRequestError(
                f"tool_choice must name one of the tools, got {self.tool_choice.function.name[:80]!r}",
                param="tool_choice.function.name",
            )
        return self


class CalledFunction(StrictModel):
    """A function that the model called, with what."""

    name: str
    arguments: str
    """The text of a JSON object."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_name(self.name)
        self.parsed_arguments()
        return self

    def parsed_arguments(self) -> dict[str, Any]:
        """The arguments, as chat templates take them. Streamed deltas of none add up to no text."""
        if not self.arguments:
            return {}
        try:
            arguments = from_json(self.arguments, allow_inf_nan=False)
        except ValueError as error:
            raise InvalidRequestError(
                f"arguments must be a JSON object: {error}", param="arguments"
            ) from None
        if not isinstance(arguments, dict):
            raise InvalidRequestError(
                f"arguments must be a JSON object, got {self.arguments[:80]!r}", param="arguments"
            )
        return arguments


class ToolCall(StrictModel):
    """A call in an earlier answer."""

    index: int | None = None
    """Of a streamed call that is sent back as it came."""
    id: str
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates take it."""
        function = {"name": self.function.name, "arguments": self.function.parsed_arguments()}
        return {"id": self.id, "type": "function", "function": function}
