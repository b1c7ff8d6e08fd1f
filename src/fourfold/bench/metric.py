"""From request records to figures: one rule for every metric.

A metric sees the requests of one run and nothing else. One that describes requests or tokens yields a list
of values, from those that succeeded, and is summarised as mean and percentiles (linear interpolation
between order statistics, as numpy and vLLM's benchmark do); one that describes the run yields a single
number, over the time that all requests took, failed ones included. A metric that has nothing to say (no
request succeeded, every answer is one token) is absent from the result, never zero.

Keys: ``<name>`` for a single number, ``<name>_<statistic>`` otherwise, as in ``ttft_ms_p90``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fourfold.core.records import RequestRecord
from fourfold.core.registry import Registry

METRICS = Registry("fourfold.bench.metrics", "METRIC", "metric")
LATENCY_STATISTICS = ("mean", "p50", "p90", "p99")
SPEED_STATISTICS = ("mean", "p50", "p10", "p1")
"""For a speed the slow tail is at the low end, so that is where its percentiles look."""


@dataclass(frozen=True)
class Metric:
    """A named figure with its unit, the sentence that defines it, and which direction is good.

    ``values`` maps the requests of a run to numbers; ``statistics`` is empty when that is a single number for
    the run. ``short`` heads narrow columns; ``rank`` orders tables.
    """

    name: str
    title: str
    short: str
    unit: str
    better: str
    definition: str
    values: Callable[[Sequence[RequestRecord]], Sequence[float]]
    statistics: tuple[str, ...] = LATENCY_STATISTICS
    rank: int = 100

    def keys(self) -> list[str]:
        """The keys this metric has in ``RunRecord.metrics``."""
        return [f"{self.name}_{s}" for s in self.statistics] or [self.name]

    def measure(self, requests: Sequence[RequestRecord]) -> dict[str, float]:
        """Key -> value; empty when there is nothing to measure."""
        values = self.values(requests)
        if len(values) == 0:
            return {}
        if not self.statistics:
            return {self.name: float(values[0])}
        return {f"{self.name}_{s}": statistic(values, s) for s in self.statistics}


def statistic(values: Sequence[float], name: str) -> float:
    """``mean`` or ``pNN`` of ``values``; percentiles interpolate linearly."""
    return float(np.mean(values) if name == "mean" else np.percentile(values, float(name[1:])))


def succeeded(requests: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The requests that ended without error."""
    return [r for r in requests if r.error is None]


def metrics_in_order() -> list[Metric]:
    """Every registered metric, by rank, then name."""
    return sorted(map(METRICS.get, METRICS.names()), key=lambda metric: (metric.rank, metric.name))


def measure_all(requests: Sequence[RequestRecord]) -> dict[str, float]:
    """All metrics of one run's requests."""
    return {key: value for metric in metrics_in_order() for key, value in metric.measure(requests).items()}


def duration_s(requests: Sequence[RequestRecord]) -> float:
    """First request sent to last response ended, over all requests, in seconds; 0 when there are none."""
    if not requests:
        return 0.0
    return max(r.end_s for r in requests) - min(r.start_s for r in requests)


def error_rate(requests: Sequence[RequestRecord]) -> float:
    """Share of requests that failed, 0..1; 1 when there are none, since nothing was shown to work."""
    return sum(r.error is not None for r in requests) / len(requests) if requests else 1.0
