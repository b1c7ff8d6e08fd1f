"""How long a user waits for the whole answer."""

from collections.abc import Sequence

from fourfold.bench.metric import Metric, succeeded
from fourfold.core.records import RequestRecord


def values(requests: Sequence[RequestRecord]) -> list[float]:
    """Milliseconds, one per request."""
    return [1000 * (r.token_times_s[-1] - r.start_s) for r in succeeded(requests) if r.token_times_s]


METRIC = Metric(
    name="e2e_ms",
    title="End-to-end latency (E2E)",
    short="E2E",
    unit="ms",
    better="lower",
    definition="From sending the request to the arrival of its last output token.",
    values=values,
    rank=80,
)
