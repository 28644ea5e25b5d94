"""A progress bar beside a run. It looks at the records now and then and costs the run nothing."""

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
    if load.num_requests is not None:
        bar = tqdm(total=load.num_requests, unit="request", disable=None)
    else:
        form = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
        bar = tqdm(total=load.duration, bar_format=form, disable=None)
    with bar:
        watcher = None if bar.disable else asyncio.create_task(_watch(bar, records, load))
        try:
            yield
        finally:
            if watcher is not None:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
                bar.refresh()


async def _watch(bar: tqdm[None], records: Sequence[RequestRecord], load: Load) -> None:
    loop = asyncio.get_running_loop()
    start = before = loop.time()
    under_way: list[RequestRecord] = []
    num_seen = num_ended = num_failed = tokens_of_ended = tokens_before = 0
    while True:
        await asyncio.sleep(SECONDS_BETWEEN)
        under_way += records[num_seen:]
        num_seen = len(records)
        for record in under_way:
            if record.finished is not None:
                num_ended += 1
                num_failed += record.error is not None
                tokens_of_ended += len(record.chunk_times)
        under_way = [record for record in under_way if record.finished is None]
        tokens = tokens_of_ended + sum(len(record.chunk_times) for record in under_way)
        now = loop.time()
        bar.n = num_ended if load.num_requests is not None else min(now - start, bar.total)
        rate = (tokens - tokens_before) / (now - before)
        failed = f", {num_failed} failed" if num_failed else ""
        bar.set_postfix_str(f"{rate:.0f} tokens/s, {len(under_way)} under way{failed}")
        before, tokens_before = now, tokens
