"""Bit for bit against two independent implementations, and against the definition written out."""

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from gfloat import formats as gf

from fourfold.formats import ScaleRule, get_format
from fourfold.formats.numbers.pack import pack, unpack

FLOATS = {
    "mxfp4": (ml_dtypes.float4_e2m1fn, gf.format_info_ocp_e2m1),
    "mxfp6-e2m3": (ml_dtypes.float6_e2m3fn, gf.format_info_ocp_e2m3),
    "mxfp6-e3m2": (ml_dtypes.float6_e3m2fn, gf.format_info_ocp_e3m2),
    "mxfp8-e4m3": (ml_dtypes.float8_e4m3fn, gf.format_info_ocp_e4m3),
    "mxfp8-e5m2": (ml_dtypes.float8_e5m2, gf.format_info_ocp_e5m2),
}
MX_NAMES = [*FLOATS, "mxint8"]
PLAIN_RULES = [rule for rule in ScaleRule if rule is not ScaleRule.MSE]


def reference_exponent(amax: np.ndarray, name: str, rule: ScaleRule) -> np.ndarray:
    """The definition in exact float64: the smallest exponent that satisfies the rule's inequality."""
    element = get_format(name).element
    fraction, exponent = np.frexp(amax.astype(np.float64))
    m, floor = fraction * 2, exponent - 1
    turns = {
        ScaleRule.FLOOR: np.zeros_like(m, bool),
        ScaleRule.EVEN: m + 2.0 ** -(element.mantissa_bits + 1) >= 2,
        ScaleRule.RCEIL: np.ldexp(m, element.max_exponent) > element.max,
        ScaleRule.CEIL: m > 1,
    }
    result = np.clip(floor - element.max_exponent + turns[rule], -127, 127)
    return np.where(amax == 0, -127, result)


def quantized(name: str, blocks: np.ndarray, rule: ScaleRule) -> tuple[np.ndarray, np.ndarray]:
    """Unpacked codes [n, 32] and exponents [n] as Fourfold makes them."""
    tensor = get_format(name).quantize(torch.from_numpy(blocks), rule)
    codes = unpack(tensor.blocks, get_format(name).element.bits)
    return codes.numpy(), tensor.scales.numpy().astype(np.int64)[:, 0] - 127


@pytest.mark.parametrize("rule", PLAIN_RULES)
@pytest.mark.parametrize("name", MX_NAMES)
def test_scales_follow_the_definition(name, rule, many_blocks):
    _, exponents = quantized(name, many_blocks[:20_000], rule)
    expected = reference_exponent(np.abs(many_blocks[:20_000]).max(-1), name, rule)
    np.testing.assert_array_equal(exponents, expected)


@pytest.mark.parametrize(
    ("name", "rule"), [("mxfp4", ScaleRule.FLOOR), *((name, ScaleRule.EVEN) for name in FLOATS)]
)
def test_codes_equal_ml_dtypes(name, rule, many_blocks):
    codes, exponents = quantized(name, many_blocks, rule)
    scaled = np.ldexp(many_blocks.astype(np.float64), -exponents[:, None]).astype(np.float32)
    largest = get_format(name).element.max
    expected = np.clip(scaled, -largest, largest).astype(FLOATS[name][0]).view(np.uint8)
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("name", FLOATS)
def test_codes_equal_gfloat(name, many_blocks):
    codes, exponents = quantized(name, many_blocks, ScaleRule.EVEN)
    scaled = np.ldexp(many_blocks.astype(np.float64), -exponents[:, None])
    info = FLOATS[name][1]
    rounded = gfloat.round_ndarray(info, scaled, gfloat.RoundMode.TiesToEven, sat=True)
    np.testing.assert_array_equal(codes, gfloat.encode_ndarray(info, rounded))


def test_integer_codes_equal_their_definition(many_blocks):
    codes, exponents = quantized("mxint8", many_blocks, ScaleRule.EVEN)
    steps = np.rint(np.ldexp(many_blocks.astype(np.float64), 6 - exponents[:, None]))
    np.testing.assert_array_equal(codes.view(np.int8), np.clip(steps, -127, 127))


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4), ("mxfp6-e2m3", 6)])
def test_even_scales_equal_compressed_tensors(name, bits, many_blocks):
    amax = np.abs(many_blocks).max(-1)
    amax = amax[amax > 2.0**-120]  # it takes no logarithm of zero and clamps elsewhere
    blocks = np.repeat(amax[:, None], 32, 1)
    _, exponents = quantized(name, blocks, ScaleRule.EVEN)
    expected = generate_mx_scales(torch.from_numpy(amax), bits)
    np.testing.assert_array_equal(exponents + 127, expected.numpy())


@pytest.mark.parametrize("name", MX_NAMES)
def test_every_code_under_every_scale_reads_back(name):
    bits = get_format(name).element.bits
    codes = np.arange(2**bits, dtype=np.uint8).repeat(32).reshape(-1, 32)
    if name == "mxint8":
        values = codes.view(np.int8).astype(np.float64) / 64
    else:
        values = codes.view(FLOATS[name][0]).astype(np.float64)
    tensor = get_format(name).quantize(torch.zeros(codes.shape))
    blocks = pack(torch.from_numpy(codes), bits)
    for byte in range(256):
        scales = torch.full_like(tensor.scales, byte)
        read = type(tensor)(name, blocks, scales).dequantize().numpy()
        with np.errstate(over="ignore"):
            expected = (values * (2.0 ** (byte - 127) if byte < 255 else np.nan)).astype(np.float32)
        np.testing.assert_array_equal(read, expected)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(read[number]), np.signbit(expected[number]))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_equals_compressed_tensors(group, many_blocks):
    x = torch.from_numpy(many_blocks[np.abs(many_blocks).max(-1) > 2.0**-10])
    x = x[x.abs().amax(-1) < 2.0**14][:2048].reshape(-1, 128)
    tensor = get_format(f"int4-g{group}").quantize(x)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    amax = x.unflatten(-1, (-1, group)).abs().amax(-1)
    scales, zeros = calculate_qparams(-amax, amax, args)
    assert torch.equal(tensor.scales, scales.half())
    expected = quantize(x, tensor.scales.float(), zeros.float(), args, dtype=torch.int8)
    codes = (unpack(tensor.blocks, 4) << 4).view(torch.int8) >> 4
    assert torch.equal(codes, expected)


def test_nvfp4_equals_ml_dtypes(many_blocks):
    x = (many_blocks[np.abs(many_blocks).max(-1) > 2.0**-20][:4096].clip(-64, 64)).reshape(-1, 16)
    tensor = get_format("nvfp4").quantize(torch.from_numpy(x))
    assert tensor.global_scale is not None
    amax, unit = np.abs(x).max(-1), tensor.global_scale.numpy()
    np.testing.assert_array_equal(unit, np.float32(64) / np.float32(448 * 6))
    scales = np.maximum(amax / np.float32(6) / unit, np.float32(2.0**-9)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(tensor.scales.numpy()[:, 0], scales.view(np.uint8))
    scaled = (x / (scales.astype(np.float32) * unit)[:, None]).clip(-6, 6)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(unpack(tensor.blocks, 4).numpy(), codes)


@pytest.mark.parametrize(("name", "axis"), [("fp8-tensor", None), ("fp8-channel", -1), ("fp8-token", -1)])
def test_fp8_equals_ml_dtypes(name, axis, many_blocks):
    x = many_blocks[np.abs(many_blocks).max(-1) > 2.0**-120].reshape(-1)[: 512 * 4096].reshape(512, 4096)
    tensor = get_format(name).quantize(torch.from_numpy(x))
    scales = np.abs(x).max(axis, keepdims=axis is not None) / np.float32(448)
    np.testing.assert_array_equal(tensor.scales.numpy(), scales)
    codes = (x / scales).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(tensor.blocks.numpy(), codes)


def test_mse_is_never_worse_than_floor_or_one_more(many_blocks):
    blocks = many_blocks[:20_000]
    floor = reference_exponent(np.abs(blocks).max(-1), "mxfp4", ScaleRule.FLOOR)
    codes, exponents = quantized("mxfp4", blocks, ScaleRule.MSE)
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)

    def error(exponent, codes):
        scaled = np.ldexp(blocks.astype(np.float64), -floor[:, None])
        return ((scaled - np.ldexp(table[codes], (exponent - floor)[:, None])) ** 2).sum(-1)

    errors = []
    for exponent in (floor, floor + 1):
        scaled = np.ldexp(blocks.astype(np.float64), -exponent[:, None]).clip(-6, 6).astype(np.float32)
        errors.append(error(exponent, scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)))
    best = np.minimum(*errors)
    np.testing.assert_allclose(error(exponents, codes), best, rtol=1e-6, atol=1e-12)
    assert set(np.unique(exponents - floor)) == {0, 1}
