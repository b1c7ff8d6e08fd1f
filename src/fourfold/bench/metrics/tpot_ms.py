"""How long each further token takes, averaged within a request."""

from collections.abc import Sequence

from fourfold.bench.metric import Metric, succeeded
from fourfold.core.records import RequestRecord


def values(requests: Sequence[RequestRecord]) -> list[float]:
    """Milliseconds, one per request of at least two tokens."""
    times = [r.token_times_s for r in succeeded(requests) if len(r.token_times_s) > 1]
    return [1000 * (t[-1] - t[0]) / (len(t) - 1) for t in times]


METRIC = Metric(
    name="tpot_ms",
    title="Time per output token (TPOT)",
    short="TPOT",
    unit="ms",
    better="lower",
    definition="For each request, (end-to-end - TTFT) / (output tokens - 1).",
    values=values,
    rank=60,
)
