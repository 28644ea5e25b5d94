"""Counters, gauges and histograms of one event loop: plain numbers, and how Prometheus names them.

prometheus-client's own instruments take a lock for every number, about 5 µs for one observation of a
histogram; here a step over hundreds of sequences observes hundreds of times, nearly all of them the same. So
the numbers are kept here, and prometheus-client writes them out (``Metric`` is its type).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString

Labels = dict[str, str]


class Instrument(ABC):
    """One metric, under a name without prefix.

    Args:
        name: a counter's without ``_total``, which is written after it.
        help: one sentence.
        peer: how it differs from vLLM's metric of that name; "" where it doesn't, None where vLLM has none.
    """

    kind: str
    """Prometheus's type."""

    def __init__(self, name: str, help: str, *, peer: str | None = "") -> None:
        self.name = name
        self.help = help
        self.peer = peer

    @property
    def label_names(self) -> tuple[str, ...]:
        """Those besides what all metrics of a server have."""
        return ()

    def family(self, prefix: str, labels: Labels) -> Metric:
        """All samples as they are now, with ``labels`` on each."""
        metric = Metric(f"{prefix}:{self.name}", self.help, self.kind)
        for suffix, own_labels, value in self.samples():
            metric.add_sample(metric.name + suffix, labels | own_labels, value)
        return metric

    @abstractmethod
    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """What goes after the name, labels, value."""


class Labelled(Instrument):
    """A number for each combination of labels.

    Args:
        labels: their names; none, and it is one number.
        known: combinations that are written from the start, as 0: a rate over a series that begins at its
            first event doesn't see that event.
    """

    def __init__(
        self,
        name: str,
        help: str,
        *,
        labels: tuple[str, ...] = (),
        known: Sequence[tuple[str, ...]] = (),
        peer: str | None = "",
    ) -> None:
        super().__init__(name, help, peer=peer)
        self._label_names = labels
        self._values: dict[tuple[str, ...], float] = dict.fromkeys(known or ([()] if not labels else []), 0.0)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._label_names

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        suffix = "_total" if self.kind == "counter" else ""
        for values, number in self._values.items():
            yield suffix, dict(zip(self._label_names, values, strict=True)), number


class Counter(Labelled):
    """A number that only grows."""

    kind = "counter"

    def inc(self, by: float = 1.0, *labels: str) -> None:
        """Add ``by`` to the series of these label values."""
        self._values[labels] = self._values.get(labels, 0.0) + by


class Gauge(Labelled):
    """A number that comes and goes."""

    kind = "gauge"

    def set(self, value: float, *labels: str) -> None:
        """Make it the value of the series of these label values."""
        self._values[labels] = value


class Histogram(Instrument):
    """How many observations were at most as large as each bound."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float], *, peer: str | None = "") -> None:
        super().__init__(name, help, peer=peer)
        self.bounds = [float(bound) for bound in bounds]
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Take in ``count`` observations of ``value``."""
        self._counts[bisect_left(self.bounds, value)] += count
        self._sum += value * count

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        totals = list(itertools.accumulate(self._counts))
        for bound, total in zip([*self.bounds, float("inf")], totals, strict=True):
            yield "_bucket", {"le": floatToGoString(bound)}, total  # type: ignore[no-untyped-call]
        yield "_count", {}, totals[-1]
        yield "_sum", {}, self._sum
