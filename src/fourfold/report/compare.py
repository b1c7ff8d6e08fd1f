"""A model beside its base: ratios at every load that both were measured at, better and worse alike.

A ratio is always model / base. Which loads are shown is not chosen: all matched ones count, a summary is
their geometric mean, and the extremes on both sides are named. Ratios within EQUAL_WITHIN of 1 are called
equal, since a single run says no more.
"""

from dataclasses import dataclass
from math import exp, log

from fourfold.bench import Metric, metrics_in_order
from fourfold.core.records import Estimate
from fourfold.report.study import Point, Subject

EQUAL_WITHIN = 0.02

COMPARED = (
    "output_throughput_tok_s",
    "tpot_ms_p50",
    "ttft_ms_p50",
    "e2e_ms_p50",
    "ttft_ms_p99",
    "itl_ms_p99",
)
"""Metrics that stand for a user's and an operator's view; the page's tables hold all of them."""


@dataclass(frozen=True)
class MetricKey:
    """One column of figures: a metric and its statistic."""

    key: str
    metric: Metric
    statistic: str

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{self.metric.title}, {self.statistic}" if self.statistic else self.metric.title


@dataclass(frozen=True)
class Matched:
    """One metric at one load, on the model and on the base."""

    point: Point
    value: float
    base: float
    better: str

    @property
    def ratio(self) -> float:
        """model / base."""
        return self.value / self.base

    @property
    def verdict(self) -> str:
        """better, worse or equal, whichever direction is good."""
        return verdict(self.ratio, self.better)

    @property
    def gain(self) -> float:
        """Above 1 when better, whichever direction is good; for ordering only."""
        return self.ratio if self.better == "higher" else 1 / self.ratio


@dataclass(frozen=True)
class Score:
    """All matched points of one metric."""

    column: MetricKey
    matches: list[Matched]

    @property
    def mean_ratio(self) -> float:
        """Geometric mean of the ratios."""
        return exp(sum(log(m.ratio) for m in self.matches) / len(self.matches))

    @property
    def best(self) -> Matched:
        """Where the model stands best against the base."""
        return max(self.matches, key=lambda m: m.gain)

    @property
    def worst(self) -> Matched:
        """Where it stands worst."""
        return min(self.matches, key=lambda m: m.gain)

    @property
    def lowest_ratio(self) -> float:
        """The smallest ratio of all."""
        return min(m.ratio for m in self.matches)

    @property
    def highest_ratio(self) -> float:
        """The largest ratio of all."""
        return max(m.ratio for m in self.matches)

    def count(self, word: str) -> int:
        """At how many points the verdict is ``word``."""
        return sum(m.verdict == word for m in self.matches)

    @property
    def verdict(self) -> str:
        """The common verdict of all points, or "mixed"."""
        words = {m.verdict for m in self.matches}
        return words.pop() if len(words) == 1 else "mixed"


def verdict(ratio: float, better: str) -> str:
    """better, worse or equal for model / base."""
    if abs(ratio - 1) <= EQUAL_WITHIN:
        return "equal"
    return "better" if (ratio > 1) == (better == "higher") else "worse"


def interval_verdict(ratio: Estimate, better: str) -> str:
    """As ``verdict``, for a ratio with an interval: "no clear difference" when the interval holds 1."""
    if ratio.low <= 1 <= ratio.high:
        return "no clear difference"
    return "better" if (ratio.value > 1) == (better == "higher") else "worse"


def columns() -> list[MetricKey]:
    """Every figure a run can have, in the order of tables."""
    keyed = [(key, metric) for metric in metrics_in_order() for key in metric.keys()]  # noqa: SIM118 - a method
    return [MetricKey(key, metric, key.removeprefix(metric.name).strip("_")) for key, metric in keyed]


def column(key: str) -> MetricKey:
    """The column called ``key``."""
    return next(c for c in columns() if c.key == key)


def match(subject: Subject, base: Subject, key: MetricKey) -> list[Matched]:
    """The metric at every load that both were measured at, and where a ratio exists."""
    pairs = ((p, subject.value(p, key.key), base.value(p, key.key)) for p in subject.points())
    return [Matched(p, v, b, key.metric.better) for p, v, b in pairs if v and b]


def score(subject: Subject, base: Subject, key: str) -> Score | None:
    """The score of one metric, or None when no load is shared."""
    chosen = column(key)
    matches = match(subject, base, chosen)
    return Score(chosen, matches) if matches else None


def scores(subject: Subject, base: Subject) -> list[Score]:
    """The scores of all compared metrics."""
    return [s for key in COMPARED if (s := score(subject, base, key))]
