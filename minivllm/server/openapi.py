"""What ``/openapi.json`` says where FastAPI and pydantic can't know: nulls, and streamed answers."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from minivllm.server.responses import ErrorEnvelope


def allow_nulls(schema: dict[str, Any]) -> None:
    """Change a request's JSON schema: a field that is null counts as not given, even an unknown one."""
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        if name not in required and {"type": "null"} not in field.get("anyOf", ()):
            told = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **told}
    schema["additionalProperties"] = {"type": "null"}


def event_stream(chunk: Any) -> dict[int | str, dict[str, Any]]:
    """A route's further responses: with ``stream: true``, events that have the shape of ``chunk``.

    Described as FastAPI describes its own event streams, with OpenAPI 3.2's ``itemSchema``.
    """
    message = {
        "type": "string",
        "description": "A chunk, or an error that ends the stream midway.",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_schema_of(chunk), _schema_of(ErrorEnvelope)]},
    }
    data = {"anyOf": [message, {"const": "[DONE]", "description": "The last event."}]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"itemSchema": event}}}}


def _schema_of(shape: Any) -> Any:
    """The JSON schema of ``shape``, which isn't recursive, with nothing defined elsewhere."""
    schema = TypeAdapter(shape).json_schema(mode="serialization")
    definitions = schema.pop("$defs", {})

    def expand(part: Any) -> Any:
        if isinstance(part, list):
            return [expand(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return expand(definitions[part["$ref"].rpartition("/")[2]])
        return {key: expand(value) for key, value in part.items()}

    return expand(schema)
