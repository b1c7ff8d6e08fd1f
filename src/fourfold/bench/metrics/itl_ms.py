"""How evenly tokens arrive: every single gap between two of them."""

from collections.abc import Sequence
from itertools import pairwise

from fourfold.bench.metric import Metric, succeeded
from fourfold.core.records import RequestRecord


def values(requests: Sequence[RequestRecord]) -> list[float]:
    """Milliseconds, one per pair of neighbouring tokens, all requests together."""
    return [1000 * (b - a) for r in succeeded(requests) for a, b in pairwise(r.token_times_s)]


METRIC = Metric(
    name="itl_ms",
    title="Inter-token latency (ITL)",
    short="ITL",
    unit="ms",
    better="lower",
    definition="Time between two neighbouring output tokens of a request, over all such gaps of all "
    "requests. Tokens that arrive in one chunk have gaps of 0.",
    values=values,
    rank=70,
)
