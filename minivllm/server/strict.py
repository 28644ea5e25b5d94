"""The base of all request bodies."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from minivllm.errors import InvalidRequestError
from minivllm.server.openapi import allow_nulls


class StrictModel(BaseModel):
    """Accepts exactly the fields it declares."""

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
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in given:
            if name in cls.unsupported:
                raise InvalidRequestError(f"{name!r} is not supported", param=name)
            if name in cls.replaced:
                raise InvalidRequestError(
                    f"{name!r} is not supported: use {cls.replaced[name]!r} instead", param=name
                )
            if name not in known:
                name = name[:80]
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise InvalidRequestError(f"unknown field {name!r}{hint}", param=name)
        return given
