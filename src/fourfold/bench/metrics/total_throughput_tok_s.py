"""How many tokens, read and written, the server gets through per second."""

from collections.abc import Sequence

from fourfold.bench.metric import Metric, duration_s, succeeded
from fourfold.core.records import RequestRecord


def values(requests: Sequence[RequestRecord]) -> list[float]:
    """One number: tokens per second."""
    done, seconds = succeeded(requests), duration_s(requests)
    tokens = sum(r.prompt_tokens + r.output_tokens for r in done)
    return [tokens / seconds] if done and seconds > 0 else []


METRIC = Metric(
    name="total_throughput_tok_s",
    title="Total throughput",
    short="total",
    unit="tok/s",
    better="higher",
    definition="Prompt and output tokens of all successful requests, divided by the time from the first "
    "request sent to the last response ended.",
    values=values,
    statistics=(),
    rank=20,
)
