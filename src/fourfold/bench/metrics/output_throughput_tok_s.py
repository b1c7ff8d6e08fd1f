"""How many tokens all users together receive per second."""

from collections.abc import Sequence

from fourfold.bench.metric import Metric, duration_s, succeeded
from fourfold.core.records import RequestRecord


def values(requests: Sequence[RequestRecord]) -> list[float]:
    """One number: tokens per second."""
    done, seconds = succeeded(requests), duration_s(requests)
    return [sum(r.output_tokens for r in done) / seconds] if done and seconds > 0 else []


METRIC = Metric(
    name="output_throughput_tok_s",
    title="Output throughput",
    short="output",
    unit="tok/s",
    better="higher",
    definition="Output tokens of all successful requests, divided by the time from the first request sent "
    "to the last response ended.",
    values=values,
    statistics=(),
    rank=10,
)
