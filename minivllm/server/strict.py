"""The base of all request bodies."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from minivllm.errors import InvalidRequestError
from minivllm.server.openapi import allow_nulls

drop_field: ContextVar[Callable[[str], None] | None] = ContextVar("drop_field", default=None)
"""Told of each field that is dropped, while a body is validated that may have more than its models do."""


class StrictModel(BaseModel):
    """Accepts exactly the fields it declares, unless :data:`drop_field` is set."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, json_schema_extra=allow_nulls)

    unsupported: ClassVar[frozenset[str]] = frozenset()
    """Fields that clients of OpenAI or vLLM may know, but that are refused here."""
    replaced: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Fields that OpenAI has given up, each with the one to use instead."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data  # pydantic's own check says what it should be
        given = {name: value for name, value in data.items() if value is not None}
        drop = drop_field.get()
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in [name for name in given if name not in known]:
            if drop is None:
                raise cls._fault_of(name, known)
            drop(name)
            del given[name]
        return given

    @classmethod
    def _fault_of(cls, name: str, known: set[str]) -> InvalidRequestError:
        """What is wrong with a field that isn't among the ``known`` ones."""
        if name in cls.unsupported:
            return InvalidRequestError(f"{name!r} is not supported", param=name)
        if name in cls.replaced:
            instead = cls.replaced[name]
            return InvalidRequestError(f"{name!r} is not supported: use {instead!r} instead", param=name)
        name = name[:80]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return InvalidRequestError(f"unknown field {name!r}{hint}", param=name)
