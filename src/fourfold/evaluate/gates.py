"""Thresholds that decide the exit code: ``--gate kl_divergence=0.05``.

The measured value itself is compared with the limit, not its interval, so that the same run always decides
the same way; whether the interval contains the limit is told beside it, because then more text could turn
the verdict. Gates look at the figures over all texts together.
"""

import math
from dataclasses import dataclass

from fourfold.core.errors import UsageError
from fourfold.core.records import Estimate, GateResult, TextQuality

UPPER_LIMITS = ("perplexity", "perplexity_ratio", "kl_divergence")
LOWER_LIMITS = ("top1_agreement",)
NEED_BASE = ("perplexity_ratio", "kl_divergence", "top1_agreement")


@dataclass(frozen=True)
class Gate:
    """``metric`` must stay at or below ``limit``; at or above it for the metrics of LOWER_LIMITS."""

    metric: str
    limit: float

    def judge(self, quality: TextQuality) -> GateResult:
        """Compare the measured value with the limit. The metric must have been measured."""
        value = estimate_of(quality, self.metric).value
        passed = value >= self.limit if self.metric in LOWER_LIMITS else value <= self.limit
        return GateResult(metric=self.metric, limit=self.limit, value=value, passed=passed)


def estimate_of(quality: TextQuality, metric: str) -> Estimate:
    """The estimate that a gate's metric names."""
    estimate = getattr(quality, metric)
    assert isinstance(estimate, Estimate), f"{metric} was not measured"
    return estimate


def parse_gates(options: list[str], has_base: bool) -> list[Gate]:
    """Gates of ``metric=limit`` words. Raises UsageError for a metric or number that cannot be."""
    gates = [_parse(option) for option in options]
    for gate in gates:
        if gate.metric in NEED_BASE and not has_base:
            raise UsageError(f"Gate '{gate.metric}' compares with a base: add --against BASE.")
    return gates


def _parse(option: str) -> Gate:
    metric, _, number = option.partition("=")
    metric = metric.strip().replace("-", "_")
    if metric not in UPPER_LIMITS + LOWER_LIMITS:
        known = ", ".join(UPPER_LIMITS + LOWER_LIMITS)
        raise UsageError(f"Unknown gate metric '{metric}' in '{option}'. Choose one of: {known}.")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit) or limit < 0:
        raise UsageError(f"Gate '{option}' needs a number, zero or above: for example {metric}=0.05.")
    return Gate(metric, limit)
