"""How many requests are answered per second."""

from collections.abc import Sequence

from fourfold.bench.metric import Metric, duration_s, succeeded
from fourfold.core.records import RequestRecord


def values(requests: Sequence[RequestRecord]) -> list[float]:
    """One number: requests per second."""
    done, seconds = succeeded(requests), duration_s(requests)
    return [len(done) / seconds] if done and seconds > 0 else []


METRIC = Metric(
    name="request_throughput_req_s",
    title="Request throughput",
    short="requests",
    unit="req/s",
    better="higher",
    definition="Successful requests, divided by the time from the first request sent to the last response "
    "ended.",
    values=values,
    statistics=(),
    rank=30,
)
