"""The fields that ask for structured output: OpenAI's ``response_format``, vLLM's ``structured_outputs``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from minivllm.errors import InvalidRequestError
from minivllm.server.strict import StrictModel
from minivllm.structured import (
    grammar_from_choice,
    grammar_from_json_object,
    grammar_from_json_schema,
    grammar_from_lark,
    grammar_from_regex,
)


def _kind_of_schema(value: Any) -> str | None:
    return "<object>" if isinstance(value, dict) else "<bool>" if isinstance(value, bool) else None


def _kind_of_schema_or_text(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else _kind_of_schema(value)


Schema = Annotated[
    Annotated[dict[str, Any], Tag("<object>")] | Annotated[bool, Tag("<bool>")],
    Discriminator(
        _kind_of_schema,
        custom_error_type="expected",
        custom_error_message="a JSON schema: an object, true or false",
    ),
]

SchemaOrText = Annotated[
    Annotated[dict[str, Any], Tag("<object>")]
    | Annotated[bool, Tag("<bool>")]
    | Annotated[str, Tag("<text>")],
    Discriminator(
        _kind_of_schema_or_text,
        custom_error_type="expected",
        custom_error_message="a JSON schema (an object, true or false) or its text",
    ),
]


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
        if self.type == "json_schema" and self.json_schema is None:
            raise InvalidRequestError("json_schema is required with type 'json_schema'", param="json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise InvalidRequestError(
                f"json_schema needs type 'json_schema', got {self.type!r}", param="json_schema"
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

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
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
