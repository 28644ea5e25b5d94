"""``--ignore-unknown-fields``: for clients that send what this server doesn't have, and can't be changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from minivllm.server.body import JsonRequest, JsonRoute

logger = logging.getLogger(__name__)

MAX_NAMES_LOGGED = 100
"""A field that is ignored is logged once, unless a client makes up new ones all the time."""


class LenientRoute(JsonRoute):
    """A route that drops a body's fields that it doesn't know or support, instead of refusing them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See :meth:`JsonRoute.get_route_handler`."""
        known: frozenset[str] = frozenset()
        if self.body_field is not None:
            known = frozenset(getattr(self.body_field.field_info.annotation, "model_fields", ()))
        logged: set[str] = set()

        class LenientRequest(JsonRequest):
            async def json(self) -> Any:
                data = await super().json()
                if not isinstance(data, dict):
                    return data
                for name in data.keys() - known - logged:
                    if len(logged) < MAX_NAMES_LOGGED:
                        logged.add(name)
                        logger.warning("%s: the field %.80r is ignored", self.url.path, name)
                return {name: value for name, value in data.items() if name in known}

        self.request_class = LenientRequest
        return super().get_route_handler()
