"""95 % intervals for figures that are averages over tokens, when the tokens of one window hang together.

A token's loss depends on the tokens around it, so counting tokens as independent makes intervals too narrow.
The window is the unit that is counted: every figure is a ratio R = sum(y_i) / sum(n_i) of window sums, its
variance comes from the spread of the window residuals z_i = y_i - R n_i, text by text (each text is a stratum
that is in the sample on purpose), and the quantile is Student's with (windows - texts) degrees of freedom, so
that few windows give a wide interval. This is the linearized ratio estimator of survey sampling (Cochran,
Sampling Techniques, 1977, chapter 6), and the clustered standard error of Miller, Adding Error Bars to
Evals (arXiv:2411.00640).

Price: neighbouring windows are taken as independent; where a text drifts slowly, intervals are a little
narrow. The interval speaks of more text of the same kinds, not of other kinds.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, stdtrit

from fourfold.core.records import Estimate

UPPER_TAIL = 0.975
LARGEST_LOG = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Mean:
    """A mean per token, its standard error over windows, and what the interval needs besides."""

    value: float
    error: float
    degrees: int
    tokens: int

    @property
    def reach(self) -> float:
        """Half the width of the symmetric interval."""
        return float(stdtrit(self.degrees, UPPER_TAIL)) * self.error


def mean_per_token(sums: list[np.ndarray], tokens: list[np.ndarray]) -> Mean:
    """Mean of window sums over tokens; one array of windows per text, each with at least two windows."""
    total = int(sum(n.sum() for n in tokens))
    value = float(sum(y.sum() for y in sums)) / total
    variance = sum(_stratum_variance(y - value * n) for y, n in zip(sums, tokens, strict=True)) / total**2
    degrees = sum(len(y) - 1 for y in sums)
    return Mean(value, math.sqrt(variance), degrees, total)


def mean_of(texts: Sequence[Sequence[np.ndarray]]) -> Mean:
    """Mean over tokens: for each text its windows, for each window an array of its tokens' values."""
    sums = [np.array([values.sum() for values in windows], float) for windows in texts]
    return mean_per_token(sums, [np.array([len(values) for values in windows]) for windows in texts])


def _stratum_variance(residuals: np.ndarray) -> float:
    """Variance of the sum of one text's residuals."""
    return len(residuals) * float(np.var(residuals, ddof=1))


def symmetric(mean: Mean, least: float = -math.inf) -> Estimate:
    """The mean itself with its plain interval, which ends at ``least`` where nothing can be below."""
    return Estimate(
        value=mean.value, low=max(mean.value - mean.reach, least), high=max(mean.value + mean.reach, least)
    )


def exponential(mean: Mean) -> Estimate:
    """exp(mean): a ratio of perplexities from a mean difference of losses; symmetric on the log scale."""
    return Estimate(
        value=_exp(mean.value), low=_exp(mean.value - mean.reach), high=_exp(mean.value + mean.reach)
    )


def perplexity(mean: Mean) -> Estimate:
    """exp(mean loss). No loss is below 0, so no perplexity is below 1, and neither is its interval."""
    estimate = exponential(mean)
    return estimate.model_copy(update={"low": max(estimate.low, 1.0)})


def positive(mean: Mean) -> Estimate:
    """A mean that cannot be negative and is skewed, like a KL divergence: symmetric in its logarithm."""
    value = max(mean.value, 0.0)  # rounding can leave a KL divergence of zero a hair below it
    if value == 0:
        return Estimate(value=0.0, low=0.0, high=max(mean.reach, 0.0))
    factor = mean.reach / value
    return Estimate(value=value, low=value * _exp(-factor), high=_exp(math.log(value) + factor))


def share(mean: Mean) -> Estimate:
    """A proportion: Clopper-Pearson on the effective number of tokens.

    Korn and Graubard, Survey Methodology 24 (1998) 193: the clustered variance tells how many independent
    tokens the windows are worth, and few windows shrink that number. Also when all tokens agree it does not
    claim to be certain, as the plain formula would.
    """
    p, n = min(max(mean.value, 0.0), 1.0), float(mean.tokens)
    if mean.error > 0:
        few = stdtrit(mean.tokens - 1, UPPER_TAIL) / stdtrit(mean.degrees, UPPER_TAIL)
        n = min(n, p * (1 - p) / mean.error**2 * float(few) ** 2)
    agreed = p * n
    low = float(betaincinv(agreed, n - agreed + 1, 1 - UPPER_TAIL)) if agreed > 0 else 0.0
    high = float(betaincinv(agreed + 1, n - agreed, UPPER_TAIL)) if agreed < n else 1.0
    return Estimate(value=p, low=min(low, p), high=max(high, p))


def _exp(x: float) -> float:
    """exp, kept finite: the widest intervals of two windows would not fit a float, nor JSON."""
    return math.exp(min(x, LARGEST_LOG))
