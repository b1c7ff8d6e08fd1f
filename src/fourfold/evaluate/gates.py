"""Thresholds that decide the exit code: ``--gate kl_divergence=0.05``, ``--gate pass@1=0.3``.

The measured value itself is compared with the limit, not its interval, so that the same run always decides
the same way; whether the interval contains the limit is told beside it, because then more text could turn
the verdict. Gates look at the figures over all texts together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.records import Estimate, GateResult, Score, TextQuality

UPPER_LIMITS = ("perplexity", "perplexity_ratio", "kl_divergence", "tail_loss", "tail_loss_increase")
LOWER_LIMITS = ("top1_agreement",)
NEED_BASE = ("perplexity_ratio", "kl_divergence", "top1_agreement", "tail_loss_increase")


@dataclass(frozen=True)
class Gate:
    """``metric`` must stay at or below ``limit``; at or above it for the metrics of LOWER_LIMITS."""

    metric: str
    limit: float

    def judge(self, quality: TextQuality) -> GateResult:
        """Compare the measured value with the limit. The metric must have been measured."""
        return self.compare(estimate_of(quality, self.metric).value, self.metric in LOWER_LIMITS)

    def judge_score(self, scores: Sequence[Score]) -> GateResult:
        """The same for the score of that name. Raises UsageError when there is none."""
        for score in scores:
            if score.name == self.metric:
                return self.compare(score.value.value, score.higher_is_better)
        raise UsageError(
            f"Gate '{self.metric}': the task has no such score with an interval. "
            f"It has: {', '.join(s.name for s in scores) or 'none'}."
        )

    def compare(self, value: float, at_least: bool) -> GateResult:
        """The result for a measured value."""
        passed = value >= self.limit if at_least else value <= self.limit
        return GateResult(metric=self.metric, limit=self.limit, value=value, passed=passed)


def estimate_of(quality: TextQuality, metric: str) -> Estimate:
    """The estimate that a gate's metric names."""
    estimate = getattr(quality, metric)
    if not isinstance(estimate, Estimate):
        raise FourfoldError(
            f"'{metric}' could not be measured on these texts. Use more text, or no gate on it."
        )
    return estimate


def parse_gates(
    options: list[str], has_base: bool, metrics: Sequence[str] = UPPER_LIMITS + LOWER_LIMITS
) -> list[Gate]:
    """Gates of ``metric=limit`` words on ``metrics``. Raises UsageError for what cannot be."""
    gates = [_parse(option, metrics) for option in options]
    for gate in gates:
        if gate.metric in NEED_BASE and not has_base:
            raise UsageError(f"Gate '{gate.metric}' compares with a base: add --against BASE.")
    return gates


def parse_score_gates(options: list[str]) -> list[Gate]:
    """Gates on scores of a served task, whose names are known when it is done."""
    return [_parse(option, None) for option in options]


def _parse(option: str, metrics: Sequence[str] | None) -> Gate:
    metric, _, number = option.rpartition("=") if "=" in option else (option, "", "")
    metric = metric.strip()
    if metrics is not None:
        metric = metric.replace("-", "_")
        if metric not in metrics:
            known = ", ".join(metrics)
            raise UsageError(f"Unknown gate metric '{metric}' in '{option}'. Choose one of: {known}.")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit) or limit < 0:
        raise UsageError(f"Gate '{option}' needs a number, zero or above: for example {metric}=0.05.")
    return Gate(metric, limit)
