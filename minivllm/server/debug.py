"""``/debug``: what the engine did in its last steps, and what that meant for one request."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from minivllm.engine.messages import StepEvents
from minivllm.engine.steps import StepRecord
from minivllm.errors import RequestNotFoundError
from minivllm.tracing.lives import Lives
from minivllm.tracing.words import life_lines

MOST_STEPS = 1000
_LISTS_OF_REQUESTS = ("arrived", "admitted", "prefills", "evicted", "ended")


class RecentSteps:
    """The last :data:`MOST_STEPS` steps. They outlive an engine that dies, of which they tell most."""

    def __init__(self) -> None:
        self._records: deque[StepRecord] = deque(maxlen=MOST_STEPS)

    def step_done(self, step: StepEvents) -> None:
        """Keep what the engine says of its steps."""
        self._records.extend(step.records)

    def engine_lost(self) -> None:
        """Nothing to do."""

    def engine_restarted(self) -> None:
        """Steps are counted anew, and the dead engine's requests have ended with it."""
        self._records.clear()

    def last(self, count: int) -> list[StepRecord]:
        """So many, the latest last."""
        return list(self._records)[-count:]


def debug_router(steps: RecentSteps) -> APIRouter:
    """The routes under ``/debug``."""
    router = APIRouter(prefix="/debug")

    @router.get("/steps")
    async def last_steps(
        limit: Annotated[int, Query(ge=1, le=MOST_STEPS)] = 100,
    ) -> dict[str, list[dict[str, Any]]]:
        """The engine's last steps: who ran and why others waited. Moments are seconds of its clock."""
        return {"steps": [_whole(record) for record in steps.last(limit)]}

    @router.get("/requests/{request_id:path}")  # an X-Request-Id may have slashes
    async def request_timeline(request_id: str) -> dict[str, Any]:
        """A request's life in the last steps, by the id of its answer or its X-Request-Id."""
        records = steps.last(MOST_STEPS)
        lives = Lives()
        for record in records:
            lives.follow(record)
        found = [
            life
            for life in lives.all
            if any(id == request_id or id.rpartition("-")[0] == request_id for id in life.arrival.ids)
        ]
        if not found:
            raise RequestNotFoundError(
                f"no request {request_id[:200]!r} arrived within the engine's last {len(records)} steps"
            )
        now = records[-1].end_time
        lives.finish(now)
        names = {life.request_id for life in found}
        return {
            "id": request_id,
            "summary": [line for life in found for line in life_lines(life, now)],
            "steps": [step for step in (_part(record, names) for record in records) if step is not None],
        }

    return router


def _whole(record: StepRecord) -> dict[str, Any]:
    """All of a step. ``asdict`` leaves named tuples alone, whose names JSON would lose."""
    return asdict(record) | {
        field: [item._asdict() for item in getattr(record, field)] for field in _LISTS_OF_REQUESTS
    }


def _part(record: StepRecord, names: set[str]) -> Mapping[str, Any] | None:
    """What a step had to do with these requests; None for nothing."""
    decodes = {name: context for name, context in record.decodes.items() if name in names}
    lists = {
        field: [item._asdict() for item in getattr(record, field) if item.request_id in names]
        for field in _LISTS_OF_REQUESTS
    }
    if not decodes and not any(lists.values()):
        return None
    return {
        "number": record.number,
        "start": record.schedule_time,
        "end": record.end_time,
        "num_seqs": record.num_seqs,
        "num_tokens": record.num_tokens,
        **({"decodes": decodes} if decodes else {}),
        **{field: items for field, items in lists.items() if items},
    }
