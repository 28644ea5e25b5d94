"""A function that a model may call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Choice = Literal["auto", "required"]
"""Whether a model may answer with text, too. (Where it must not call anything, it isn't told of tools.)"""


@dataclass(frozen=True, slots=True)
class Tool:
    """What a model is told of a function, and what its arguments are checked against."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """A JSON schema of type object."""
    is_strict: bool = False
    """Whether arguments must follow the schema even where the model is free to call or not."""

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        # Always a description: there are templates that take it for granted.
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}
