"""A progress bar beside a run: it looks at the records twice a second, and requests know nothing of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from tqdm import tqdm

from minivllm_bench.load import Load
from minivllm_bench.records import RequestRecord

SECONDS_BETWEEN = 0.5


@contextlib.asynccontextmanager
async def show_progress(records: Sequence[RequestRecord], load: Load) -> AsyncIterator[None]:
    """On standard error, if that is a terminal: how far the run is, and how much comes back.

    Args:
        records: of the run; they grow while it lasts.
        load: what ends it.
    """
    counts_requests = load.num_requests is not None
    total = load.num_requests if counts_requests else load.duration
    layout = None if counts_requests else "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=total, unit=" requests", bar_format=layout, disable=None) as bar:
        if bar.disable:
            yield
            return
        progress = _Progress(bar, records, counts_requests)
        watcher = asyncio.create_task(progress.watch())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            progress.update()


class _Progress:
    def __init__(self, bar: tqdm[None], records: Sequence[RequestRecord], counts_requests: bool) -> None:
        self._bar = bar
        self._records = records
        self._counts_requests = counts_requests
        self._loop = asyncio.get_running_loop()
        self._start = self._last_time = self._loop.time()
        self._last_tokens = 0
        self._under_way: list[RequestRecord] = []
        self._num_seen = self._num_failed = self._tokens_of_ended = 0

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN)
            self.update()

    def update(self) -> None:
        """Show how far the run is; the rate is that since the last time."""
        candidates = [*self._under_way, *self._records[self._num_seen :]]
        self._num_seen = len(self._records)
        self._under_way = [record for record in candidates if record.finished is None]
        for record in candidates:
            if record.finished is not None:
                self._num_failed += record.error is not None
                self._tokens_of_ended += len(record.chunk_times)
        tokens = self._tokens_of_ended + sum(len(record.chunk_times) for record in self._under_way)
        now = self._loop.time()
        rate = (tokens - self._last_tokens) / max(now - self._last_time, 1e-3)
        self._last_time, self._last_tokens = now, tokens
        num_ended = self._num_seen - len(self._under_way)
        self._bar.n = num_ended if self._counts_requests else min(now - self._start, self._bar.total)
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {len(self._under_way)} under way{failed}")
