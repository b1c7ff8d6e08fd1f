"""How many requests failed."""

from collections.abc import Sequence

from fourfold.bench.metric import Metric
from fourfold.bench.metric import error_rate as share_of_errors
from fourfold.core.records import RequestRecord


def values(requests: Sequence[RequestRecord]) -> list[float]:
    """One number: a share, 0..1."""
    return [share_of_errors(requests)]


METRIC = Metric(
    name="error_rate",
    title="Error rate",
    short="errors",
    unit="share",
    better="lower",
    definition="Requests that failed or were not answered with exactly the tokens asked for, divided by "
    "all requests. Above 0.1 the run is excluded.",
    values=values,
    statistics=(),
    rank=90,
)
