"""Writes ``docs/metrics.md`` from the code: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from minivllm.request import EngineInfo, EngineStats
from minivllm.server.instruments import Histogram, Instrument
from minivllm.server.metrics import ServerMetrics

METRICS_MD = Path(__file__).with_name("metrics.md")
LONGEST = 4096
INTRODUCTION = """\
# Metrics

Generated from the code by `make docs`; `tests/test_api_docs.py` fails when it is out of date.

`GET /metrics` has these, in Prometheus's text format or, for those who ask, in OpenMetrics. All names begin
with `minivllm:` (`--metrics-prefix`), and all series have the labels `model_name` and `engine` (always `0`).
With API keys, `/metrics` needs one: see [operations](operations.md#metrics-logs-traces).

**Dashboards and alerts made for vLLM find their metrics with `--metrics-prefix vllm`**: names, types, labels
and buckets are those of vLLM's engine (V1) wherever the meaning is the same. The last column says where it
isn't; **own** is what vLLM doesn't have. A "sequence" is one sample of one prompt: `n` of them make the
answer to one HTTP request.

"""
DIFFERENCES = """\

## Different from vLLM on purpose

- **Chunks count where they run.** `iteration_tokens_total` is what went through the model in each step, as
  the scheduler put it together. vLLM counts a prompt as a whole in the step that ends it, and nothing when a
  sequence is computed again.
- **Waiting has a cause.** `num_requests_waiting_by_reason` names the flag whose limit is reached, or `blocks`
  where the KV cache is full: what to change is in the label.
- **Who gives up in the queue counts.** `request_queue_time_seconds` has them with all of the time that they
  waited; prefill and decode times have only sequences that came that far.
- **More buckets, none less.** Times have finer buckets below vLLM's smallest (10 ms between tokens, 300 ms
  for a request's phases), where a small model or a fast GPU has most of its observations.
- **Nothing that is always empty**: no metrics of LoRA, speculative decoding, multi-modal caches, KV transfer,
  or sleep. `prompt_tokens_by_source` would say what `prompt_tokens` and `prompt_tokens_cached` say.
- `/metrics` needs a key where the other routes do.

The HTTP process's own memory, CPU time and file descriptors are there as `process_*`, without prefix and
labels, on Linux. The engine is a process of its own, and not in them.
"""


def main() -> str:
    """The whole document."""
    stats = EngineStats(0, 0, 0, 1, 0, 0, 0)
    metrics = ServerMetrics("minivllm", "model", EngineInfo(LONGEST, 1), stats)
    rows = ["| name | type | labels | | vLLM |", "|---|---|---|---|---|"]
    rows += [_row(instrument) for instrument in metrics.instruments]
    bounds = ["", "## Buckets", "", "| histograms | upper bounds |", "|---|---|"]
    for upper, names in _by_bounds(metrics.instruments).items():
        bounds.append(f"| {', '.join(f'`{name}`' for name in names)} | {upper} |")
    return INTRODUCTION + "\n".join([*rows, *bounds]) + "\n" + DIFFERENCES


def _row(instrument: Instrument) -> str:
    name = instrument.name + ("_total" if instrument.kind == "counter" else "")
    labels = ", ".join(f"`{label}`" for label in instrument.label_names)
    peer = "**own**" if instrument.peer is None else instrument.peer or "the same"
    return f"| `{name}` | {instrument.kind} | {labels} | {instrument.help} | {peer} |"


def _by_bounds(instruments: list[Instrument]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for instrument in instruments:
        if isinstance(instrument, Histogram):
            upper = ", ".join(f"{bound:g}" for bound in instrument.bounds)
            if instrument.bounds[-1] == 2000:  # as far as LONGEST goes
                upper = "1, 2, 5, 10, 20, 50, … up to `--max-model-len`"
            found.setdefault(upper, []).append(instrument.name)
    return found


if __name__ == "__main__":
    METRICS_MD.write_text(main())
