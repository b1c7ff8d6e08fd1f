"""Thresholds: which side of the limit passes, and what is refused before any work is done."""

import pytest

from fourfold.core.errors import UsageError
from fourfold.core.records import Estimate, TextQuality
from fourfold.evaluate import parse_gates


def exactly(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value)


QUALITY = TextQuality(
    tokens=10,
    perplexity=exactly(12.0),
    perplexity_ratio=exactly(1.02),
    kl_divergence=Estimate(value=0.05, low=0.04, high=0.06),
    top1_agreement=exactly(0.9),
)


@pytest.mark.parametrize(
    ("option", "passed"),
    [
        ("perplexity=12", True),
        ("perplexity=11.99", False),
        ("perplexity_ratio=1.02", True),
        ("perplexity-ratio=1.01", False),
        ("kl_divergence=0.05", True),
        ("kl_divergence=0.049", False),
        ("top1_agreement=0.9", True),
        ("top1_agreement=0.91", False),
    ],
)
def test_a_gate_compares_the_value_itself(option, passed):
    (gate,) = parse_gates([option], has_base=True)
    result = gate.judge(QUALITY)
    assert result.passed is passed
    assert result.metric in option.replace("-", "_")


@pytest.mark.parametrize("option", ["kl=0.1", "=0.1", "tokens=5", ""])
def test_an_unknown_metric_is_refused(option):
    with pytest.raises(UsageError, match=r"Unknown gate metric.*kl_divergence"):
        parse_gates([option], has_base=True)


@pytest.mark.parametrize(
    "option", ["perplexity", "perplexity=", "perplexity=x", "perplexity=nan", "perplexity=-1"]
)
def test_a_limit_that_is_no_number_is_refused(option):
    with pytest.raises(UsageError, match="needs a number"):
        parse_gates([option], has_base=True)


@pytest.mark.parametrize("metric", ["perplexity_ratio", "kl_divergence", "top1_agreement"])
def test_a_gate_on_the_base_needs_a_base(metric):
    with pytest.raises(UsageError, match="--against"):
        parse_gates([f"{metric}=0.5"], has_base=False)
    assert parse_gates(["perplexity=20"], has_base=False)
