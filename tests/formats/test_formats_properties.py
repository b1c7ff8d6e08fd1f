"""What holds for every block, found wanting by hypothesis if it does not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fourfold.formats import ScaleRule, format_names, get_format
from fourfold.formats.numbers.pack import pack, unpack

MX_NAMES = [name for name in format_names() if name.startswith("mx")]
KEEPING_NAMES = ["nvfp4", "fp8-tensor", "fp8-channel", "fp8-token"]
INT4_NAMES = [name for name in format_names() if name.startswith("int4")]
quick = settings(max_examples=40, deadline=None)


@st.composite
def tensors(draw, largest: float = 2.0**40, smallest: float = 0.0) -> torch.Tensor:
    """Float32 [2, 128] with many equal, tied and tiny values; magnitudes 0 or from ``smallest``."""
    values = st.floats(-largest, largest, width=32)
    ties = st.integers(-64, 64).map(lambda n: n / 8)
    array = draw(arrays(np.float32, (2, 128), elements=st.one_of(values, ties), fill=ties))
    return torch.from_numpy(np.where(np.abs(array) < smallest, 0, array).astype(np.float32))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("name", MX_NAMES)
@given(x=tensors(), rule=st.sampled_from(ScaleRule))
@quick
def test_what_is_quantized_stays(name, x, rule):
    once = get_format(name).quantize(x, rule).dequantize()
    assert same(get_format(name).quantize(once, rule).dequantize(), once)


@pytest.mark.parametrize("name", KEEPING_NAMES)
@given(x=tensors(largest=4096, smallest=2.0**-8))
@quick
def test_what_is_quantized_keeps_its_codes(name, x):
    once = get_format(name).quantize(x)
    again = get_format(name).quantize(once.dequantize())
    assert torch.equal(once.blocks, again.blocks)
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MX_NAMES)
@given(x=tensors(smallest=2.0**-20), rule=st.sampled_from(ScaleRule), shift=st.integers(-60, 60))
@quick
def test_powers_of_two_commute(name, x, rule, shift):
    plain, shifted = (get_format(name).quantize(x * 2.0**n, rule) for n in (0, shift))
    assert torch.equal(plain.blocks, shifted.blocks)
    zero_blocks = x.view(2, -1, 32).abs().amax(-1) == 0
    moved = torch.where(zero_blocks, 0, plain.scales.int() + shift)
    assert torch.equal(shifted.scales.int(), moved)


@pytest.mark.parametrize("name", MX_NAMES)
@given(x=tensors(), rule=st.sampled_from(ScaleRule))
@quick
def test_error_is_half_a_step_or_the_saturation(name, x, rule):
    element = get_format(name).element
    tensor = get_format(name).quantize(x, rule)
    scale = (2.0 ** (tensor.scales.double() - 127)).repeat_interleave(32, -1)
    value, error = x.double().abs(), (x.double() - tensor.dequantize().double()).abs()
    relative = 0.0 if element.is_integer else 2.0 ** -(element.mantissa_bits + 1)
    bound = torch.maximum(scale * element.min / 2, value * relative)
    saturated = (value - scale * element.max).clamp_min(0)
    assert bool((error <= torch.maximum(bound, saturated)).all())
    if rule in (ScaleRule.RCEIL, ScaleRule.CEIL):
        assert not saturated.any()


@pytest.mark.parametrize("name", format_names())
@given(x=tensors(largest=2.0**15))
@quick
def test_order_and_sign_are_kept(name, x):
    x = x.sort(-1).values
    values = get_format(name).quantize(x.view(4, 64).repeat(1, 2)).dequantize()[:, :64]
    blocks = values.unflatten(-1, (-1, min(64, get_format(name).block_size or 64)))
    assert bool((blocks.diff(dim=-1) >= 0).all())
    if name not in INT4_NAMES:  # it reaches -8 but only 7
        assert torch.equal(get_format(name).fake_quantize(-x), -get_format(name).fake_quantize(x))


@pytest.mark.parametrize("name", INT4_NAMES)
@given(x=tensors(largest=4096, smallest=2.0**-8))
@quick
def test_int4_error_is_half_a_step(name, x):
    tensor = get_format(name).quantize(x)
    step = tensor.scales.float().repeat_interleave(get_format(name).block_size or 1, -1)
    half = 0.5 + 7.5 * 2**-11  # the float16 scale may be rounded down by 2^-11 of itself
    assert bool(((x - tensor.dequantize()).abs() <= half * step).all())


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fake_quantize_is_there_and_back(name, dtype):
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = get_format(name).quantize(x).dequantize(dtype)
    assert same(get_format(name).fake_quantize(x), expected)
    assert expected.dtype == dtype


@pytest.mark.parametrize("bits", [4, 6, 8])
@given(data=st.data())
@quick
def test_unpack_undoes_pack(bits, data):
    codes = data.draw(arrays(np.uint8, (3, 32), elements=st.integers(0, 2**bits - 1)))
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.shape == (3, 4 * bits)
    assert torch.equal(unpack(packed, bits), torch.from_numpy(codes))
