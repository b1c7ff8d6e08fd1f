"""Intervals hold what they promise: checked by simulation against truths known in closed form."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from fourfold.evaluate import evaluate
from fourfold.evaluate.intervals import exponential, mean_per_token, perplexity, positive, share

METRICS = ("perplexity", "perplexity_base", "perplexity_ratio", "kl_divergence", "top1_agreement")
REPLICATIONS = 200


@pytest.fixture(scope="module")
def replications(markov_pair):
    """Many evaluations, each on two fresh texts of eight windows."""
    model, base = markov_pair
    rng = np.random.default_rng(11)
    return [
        evaluate(
            model,
            base,
            {name: base.sample(8 * 96, rng) for name in ("one", "two")},
            window_tokens=96,
        ).overall
        for _ in range(REPLICATIONS)
    ]


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_covers_the_truth_about_95_times_in_100(metric, replications, markov_truth):
    expected = getattr(markov_truth, metric)
    estimates = [getattr(quality, metric) for quality in replications]
    covered = sum(e.low <= expected <= e.high for e in estimates) / REPLICATIONS
    assert 0.88 <= covered <= 0.99
    assert np.mean([e.value for e in estimates]) == pytest.approx(expected, rel=0.02)


def test_counting_tokens_as_independent_would_promise_too_much(markov_pair, markov_truth):
    """The reason for clustering: on the same texts, windows of one token cover far less often."""
    _, base = markov_pair
    rng = np.random.default_rng(12)
    covered = 0
    for _ in range(REPLICATIONS):
        ids = base.encode(base.sample(16 * 96, rng))
        losses = -np.log(base.transitions[ids[:-1], ids[1:]])
        estimate = exponential(mean_per_token([losses], [np.ones_like(losses)]))
        covered += estimate.low <= markov_truth.perplexity_base <= estimate.high
    assert covered / REPLICATIONS < 0.85


def test_two_windows_give_the_wide_interval_of_one_degree_of_freedom():
    mean = mean_per_token([np.array([100.0, 110.0])], [np.array([50, 50])])
    assert mean.value == pytest.approx(2.1)
    assert mean.error == pytest.approx(0.1)  # sd of two windows' means (2.0, 2.2) over sqrt 2
    assert mean.reach == pytest.approx(0.1 * 12.7062, rel=1e-4)


def test_a_difference_between_texts_does_not_widen_the_interval():
    """Texts are strata: that one is harder than the other is no uncertainty."""
    easy, hard, n = np.array([10.0, 11.0, 12.0]), np.array([90.0, 91.0, 92.0]), np.array([10, 10, 10])
    together = mean_per_token([easy, hard], [n, n])
    assert together.value == pytest.approx(306 / 60)
    assert together.error == pytest.approx(math.sqrt(2 * 3 * 1.0) / 60)
    assert together.degrees == 4


def test_agreement_of_all_tokens_does_not_claim_certainty():
    n = np.array([100, 100])
    all_agree = share(mean_per_token([np.array([100.0, 100.0])], [n]))
    assert all_agree.value == all_agree.high == 1.0
    assert all_agree.low == pytest.approx(0.025 ** (1 / 200))


def test_agreement_without_clustering_is_clopper_pearson():
    # equal shares in all windows: no variance between windows, so the tokens count as they are
    expected = binomtest(81, 90).proportion_ci(method="exact")
    estimate = share(mean_per_token([np.array([27.0, 27.0, 27.0])], [np.array([30, 30, 30])]))
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-6)


def test_divergence_stays_above_zero_and_zero_stays_zero():
    n = np.array([10, 10])
    wide = positive(mean_per_token([np.array([0.001, 0.2])], [n]))
    assert 0 < wide.low < wide.value < wide.high
    none = positive(mean_per_token([np.array([-1e-9, -1e-9])], [n]))
    assert (none.value, none.low, none.high) == (0, 0, 0)


def test_an_interval_too_wide_for_a_float_is_still_json():
    estimate = exponential(mean_per_token([np.array([10.0, 90000.0])], [np.array([10, 10])]))
    assert math.isfinite(estimate.high)
    assert type(estimate).model_validate_json(estimate.model_dump_json()) == estimate


def test_a_perplexity_below_one_is_in_no_interval():
    """Two easy windows: the plain interval of the mean loss reaches below zero, where no loss can be."""
    mean = mean_per_token([np.array([1.0, 9.0])], [np.array([50, 50])])
    assert exponential(mean).low < 1  # a ratio of perplexities may be there
    estimate = perplexity(mean)
    assert (estimate.value, estimate.low) == (pytest.approx(math.exp(0.1)), 1.0)
    assert estimate.high == exponential(mean).high
