"""``--ignore-unknown-fields``: for clients that send what this server doesn't have, and can't be changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from minivllm.server.body import JsonRequest, JsonRoute
from minivllm.server.strict import drop_field

logger = logging.getLogger(__name__)

MAX_NAMES_LOGGED = 100
"""A field that is ignored is logged once, unless a client makes up new ones all the time."""


class LenientRoute(JsonRoute):
    """A route that drops a body's fields that it doesn't know or support, wherever they are in it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See :meth:`JsonRoute.get_route_handler`."""
        logged: set[str] = set()

        class LenientRequest(JsonRequest):
            async def json(self) -> Any:
                drop_field.set(self._log)  # for what validates this body, in this task
                return await super().json()

            def _log(self, name: str) -> None:
                if name not in logged and len(logged) < MAX_NAMES_LOGGED:
                    logged.add(name)
                    logger.warning("%s: the field %.80r is ignored", self.url.path, name)

        self.request_class = LenientRequest
        return super().get_route_handler()
