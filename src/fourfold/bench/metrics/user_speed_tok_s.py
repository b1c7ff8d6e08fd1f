"""How fast one user sees the answer grow; also called interactivity."""

from collections.abc import Sequence

from fourfold.bench.metric import SPEED_STATISTICS, Metric, succeeded
from fourfold.core.records import RequestRecord


def values(requests: Sequence[RequestRecord]) -> list[float]:
    """Tokens per second of each request after its first token."""
    done = [(r, r.token_times_s[-1] - r.token_times_s[0]) for r in succeeded(requests) if r.token_times_s]
    return [(len(r.token_times_s) - 1) / seconds for r, seconds in done if seconds > 0]


METRIC = Metric(
    name="user_speed_tok_s",
    title="Speed per user",
    short="per user",
    unit="tok/s/user",
    better="higher",
    definition="For each request, (tokens - 1) divided by the time from its first to its last token: the "
    "inverse of TPOT. p10 and p1 are the slow end.",
    values=values,
    statistics=SPEED_STATISTICS,
    rank=40,
)
