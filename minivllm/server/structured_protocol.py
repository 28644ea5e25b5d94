"""The fields that ask for structured output: OpenAI's ``response_format``, vLLM's ``structured_outputs``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from minivllm.errors import InvalidRequestError
from minivllm.server.strict import StrictModel
from minivllm.structured import (
    grammar_from_choice,
    grammar_from_json_object,
    grammar_from_json_schema,
    grammar_from_lark,
    grammar_from_regex,
)

Schema = dict[str, Any] | bool


class JsonSchema(StrictModel):
    """OpenAI's ``json_schema``. The schema is enforced, whatever ``strict`` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(StrictModel):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequestError(
                "json_schema is required with type 'json_schema', and only allowed there, "
                f"but type is {self.type!r}",
                param="json_schema",
            )
        return self

    def grammar(self) -> str | None:
        """None where any text will do."""
        if self.json_schema is not None:
            return grammar_from_json_schema(self.json_schema.schema_)
        return grammar_from_json_object() if self.type == "json_object" else None


class StructuredOutputs(StrictModel):
    """vLLM's ``structured_outputs``: exactly one of four."""

    unsupported = frozenset(
        {
            "disable_additional_properties",
            "disable_any_whitespace",
            "disable_fallback",
            "json_object",
            "structural_tag",
            "whitespace_pattern",
        }
    )

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    regex: str | None = None
    grammar_: Annotated[str | None, Field(alias="grammar")] = None
    choice: Annotated[list[str] | None, Field(min_length=1, fail_fast=True)] = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        fields = (self.json_, self.regex, self.grammar_, self.choice)
        num_given = sum(value is not None for value in fields)
        if num_given != 1:
            raise InvalidRequestError(
                f"exactly one of json, regex, grammar and choice is required, got {num_given}"
            )
        return self

    def grammar(self) -> str:
        """The answer's grammar."""
        if self.json_ is not None:
            return grammar_from_json_schema(self.json_)
        if self.regex is not None:
            return grammar_from_regex(self.regex)
        if self.choice is not None:
            return grammar_from_choice(self.choice)
        return grammar_from_lark(self.grammar_ or "")


def make_grammar(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> tuple[str | None, str | None]:
    """A request's grammar, if it asks for one, and the field that does.

    Raises :class:`InvalidRequestError` where it can't be made, naming the field.
    """
    for param, field in (("response_format", response_format), ("structured_outputs", structured_outputs)):
        if field is None:
            continue
        try:
            grammar = field.grammar()
        except InvalidRequestError as error:
            error.param = param
            raise
        if grammar is not None:
            if param == "response_format" and structured_outputs is not None:
                raise InvalidRequestError(
                    "response_format and structured_outputs can't be combined: give one of them", param=param
                )
            return grammar, param
    return None, None
