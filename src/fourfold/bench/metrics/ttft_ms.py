"""How long a user waits before anything appears."""

from collections.abc import Sequence

from fourfold.bench.metric import Metric, succeeded
from fourfold.core.records import RequestRecord


def values(requests: Sequence[RequestRecord]) -> list[float]:
    """Milliseconds, one per request."""
    return [1000 * (r.token_times_s[0] - r.start_s) for r in succeeded(requests) if r.token_times_s]


METRIC = Metric(
    name="ttft_ms",
    title="Time to first token (TTFT)",
    short="TTFT",
    unit="ms",
    better="lower",
    definition="From sending the request to the arrival of its first output token; queueing and the "
    "reading of the prompt are inside.",
    values=values,
    rank=50,
)
