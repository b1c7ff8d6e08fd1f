"""How numbers are written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.report.digits import change, count, figure, memory, percent, ratio, size


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.012345, "0.0123"),
        (4.5678, "4.57"),
        (45.678, "45.7"),
        (456.78, "457"),
        (1234.5, "1,234"),
        (0, "0"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "–"),
        (1.5e9, "1.50e+09"),
        (0.00001, "1.00e-05"),
        (-2.5, "-2.50"),
    ],
)
def test_figures(value, expected):
    assert figure(value) == expected


@settings(deadline=None, max_examples=40)
@given(st.floats(1e-4, 1e6))
def test_a_figure_is_within_half_a_percent(value):
    assert float(figure(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


def test_units():
    assert (size(512), size(269_060_552), size(1_500)) == ("512 B", "269 MB", "1.50 kB")
    assert (memory(2**34), count(134_515_008), count(999), percent(0.6888)) == (
        "16.0 GiB",
        "135 M",
        "999",
        "68.9 %",
    )
    assert (ratio(0.4204), ratio(12.34)) == ("0.42×", "12.3×")
    assert (change(1.0734), change(0.871), change(1.001), change(1.429)) == (
        "+7.34 %",
        "−12.9 %",
        "+0.10 %",
        "+42.9 %",
    )
