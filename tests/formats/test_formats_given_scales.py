"""Rounding to an element's grid, and quantizing under scales that were chosen elsewhere."""

import pytest
import torch

from fourfold.core.errors import FourfoldError
from fourfold.formats import format_names, get_format
from fourfold.formats.numbers.element import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT8

ELEMENTS = [E2M1, E2M3, E3M2, E4M3, E5M2, INT8, INT4]
MX_NAMES = [name for name in format_names() if name.startswith("mx")]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def values_for(element) -> torch.Tensor:
    """Every value, every midpoint and what lies one float32 step beside both, and what saturates."""
    grid = element.decode(torch.arange(2**element.bits, dtype=torch.uint8))
    grid = grid[grid.isfinite()].sort().values
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, 2 * grid, torch.tensor([0.0, -0.0])])
    up, down = (points.nextafter(torch.tensor(limit)) for limit in (torch.inf, -torch.inf))
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * element.max / 3
    return torch.cat([points, up, down, noise, noise * element.min])


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_round_is_encode_and_decode(element):
    x = values_for(element)
    rounded = element.round(x)
    expected = element.decode(element.encode(x))
    assert same(rounded, expected) if not element.is_integer else torch.equal(rounded, expected)
    assert element.round(torch.tensor([torch.nan, torch.inf])).tolist()[1] == element.max
    assert element.round(torch.tensor([torch.nan])).isnan().all()
    assert torch.equal(x, values_for(element))  # its argument is left as it was


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_step_is_the_distance_to_the_next_value(element):
    grid = element.decode(torch.arange(2 ** (element.bits - 1), dtype=torch.uint8))
    grid = grid[grid <= element.max]
    assert torch.equal(element.step(grid[:-1]), grid.diff())


@pytest.mark.parametrize("name", MX_NAMES)
@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "mse"])
def test_rounding_on_scales_is_fake_quantize(name, rule, many_blocks):
    x = torch.from_numpy(many_blocks[:5000])
    form = get_format(name)
    scale = form.multipliers(form.scales(x, rule))
    rounded = form.element.round(x / scale) * scale
    expected = form.fake_quantize(x, rule)
    assert same(rounded, expected) if not form.element.is_integer else torch.equal(rounded, expected)


@pytest.mark.parametrize("name", format_names())
def test_its_own_scales_give_the_same_bytes(name):
    x = torch.randn(5, 3, 256, generator=torch.Generator().manual_seed(1))
    x[0, 0, :128] = 0
    form = get_format(name)
    expected = form.quantize(x)
    scales = form.scales(x)
    assert torch.equal(scales.float(), expected.scales.float())
    multipliers = form.multipliers(scales, expected.global_scale)
    again = form.nearest_scales(multipliers * 1.01, expected.global_scale)
    torch.testing.assert_close(
        form.multipliers(again, expected.global_scale), multipliers, rtol=0.011, atol=0
    )
    given = form.quantize_with_scales(x, scales, expected.global_scale)
    assert torch.equal(given.blocks, expected.blocks)
    assert torch.equal(given.dequantize(), expected.dequantize())


def test_given_exponents_are_used():
    form = get_format("mxfp4")
    x = torch.tensor([[5.0, -7.0, 0.3, 1.0] * 8])
    # ties go to even mantissas: 5 to 4 and not 6, 2.5 to 2, 3.5 to 4
    for byte, wanted in [(127, [4, -6, 0.5, 1]), (128, [4, -8, 0, 1]), (126, [3, -3, 0.25, 1])]:
        tensor = form.quantize_with_scales(x, torch.tensor([[byte]], dtype=torch.uint8), rule="mse")
        assert tensor.scale_rule == "mse"
        assert tensor.dequantize()[0, :4].tolist() == wanted


def test_a_block_that_is_not_a_number_stays_one():
    form = get_format("mxfp4")
    scales = torch.tensor([[255, 127]], dtype=torch.uint8)
    tensor = form.quantize_with_scales(torch.ones(1, 64), scales)
    assert tensor.dequantize()[0, :32].isnan().all()
    assert tensor.dequantize()[0, 32:].eq(1).all()


def test_values_that_are_not_finite_are_refused():
    x = torch.ones(1, 32)
    x[0, 3] = torch.inf
    with pytest.raises(FourfoldError, match="not finite"):
        get_format("mxfp4").quantize_with_scales(x, torch.full((1, 1), 127, dtype=torch.uint8))


def test_scales_of_another_shape_are_refused():
    with pytest.raises(FourfoldError, match=r"must be torch.uint8 \[2, 2\], not torch.uint8 \[2, 1\]"):
        get_format("mxfp4").quantize_with_scales(torch.ones(2, 64), torch.zeros(2, 1, dtype=torch.uint8))
