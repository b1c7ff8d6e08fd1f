"""``linear``, the door: activations against a naive formula, every path against doubles, refusals."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from kernel_helpers import assert_product, random_weight, random_x, values_of

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.formats import BlockTensor, get_format
from fourfold.kernels import expanded, linear, pack, reference


def packed(x, w, activation=None):
    return linear(x, pack(w), activation)


# mantissa bits, exponent of the smallest normal, largest value
ELEMENTS = {
    "mxfp8-e4m3": (3, -6, 448.0),
    "mxfp6-e2m3": (3, 0, 7.5),
    "mxfp6-e3m2": (2, -2, 28.0),
    "mxfp4": (1, 0, 6.0),
}


def to_element(value: float, mantissa: int, lowest: int, largest: float) -> float:
    """Nearest element, ties to even, saturating; in Python's doubles."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(value)[1] - 1, lowest) - mantissa)
    return math.copysign(min(abs(round(value / step) * step), largest), value)


def naive_mx(x: np.ndarray, mantissa: int, lowest: int, largest: float) -> np.ndarray:
    """Blocks of 32 under a power of two by the rule EVEN, one value at a time."""
    result = []
    for block in x.reshape(-1, 32):
        fraction, exponent = math.frexp(np.abs(block).max())  # fraction in [.5, 1)
        bump = 2 * fraction >= 2 - 2.0 ** -(mantissa + 1)
        scale = 2.0 ** (exponent - 1 + bump - (math.frexp(largest)[1] - 1))
        result += [to_element(float(value) / scale, mantissa, lowest, largest) * scale for value in block]
    return np.array(result).reshape(x.shape)


def naive_fp8_token(x: np.ndarray) -> np.ndarray:
    """Each row under amax / 448; the scale and the quotients are float32, as the format says."""
    values = x.astype(np.float32)
    scales = np.abs(values).max(-1, keepdims=True) / np.float32(448)
    codes = np.vectorize(lambda value: to_element(float(value), 3, -6, 448.0))(values / scales)
    return codes * scales.astype(np.float64)


@pytest.mark.parametrize("run", [linear, packed, reference.linear], ids=["linear", "packed", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("activation", [*ELEMENTS, "fp8-token", None])
def test_activation_is_emulated_exactly(run, dtype, activation):
    w, x = random_weight(33, 96), random_x(5, 96, dtype) * 3
    exact = x.double().numpy()
    if activation == "fp8-token":
        exact = naive_fp8_token(exact)
    elif activation:
        exact = naive_mx(exact, *ELEMENTS[activation])
    y = run(x, w, activation)
    assert y.dtype == dtype
    product = torch.from_numpy(exact @ values_of(w).T)
    torch.testing.assert_close(
        y.double(), product, rtol=2**-8 if dtype == torch.bfloat16 else 2e-6, atol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("m", [1, 4, 31, 33, 64, 100])
def test_few_and_many_rows_are_the_same_product(dtype, m):
    w, x = random_weight(65, 192), random_x(m, 192, dtype)
    assert_product(linear(x, w), x, values_of(w))
    assert_product(packed(x, w), x, values_of(w))
    assert_product(reference.linear(x, w), x, values_of(w))


@pytest.mark.parametrize("name", ["mxfp8-e4m3", "mxfp8-e5m2", "mxfp6-e2m3", "mxfp6-e3m2", "mxint8", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_weights_of_every_mx_format(name, dtype):
    w, x = get_format(name).quantize(random_x(40, 96, torch.float32)), random_x(6, 96, dtype)
    values = w.dequantize(torch.float64).numpy()
    assert_product(linear(x, w), x, values)
    assert_product(packed(x, w), x, values)
    assert_product(reference.linear(x, w), x, values)


@pytest.mark.parametrize("name", ["nvfp4", "int4-g32", "fp8-tensor", "fp8-channel"])
def test_weights_whose_scales_are_no_powers_of_two(name):
    w, x = get_format(name).quantize(random_x(40, 96, torch.float32)), random_x(6, 96, torch.bfloat16)
    values = w.dequantize(torch.float32).double().numpy()
    assert_product(linear(x, w), x, values)
    assert_product(reference.linear(x, w), x, values)


def test_a_weight_larger_than_a_slice(monkeypatch):
    w, x = random_weight(101, 96), random_x(40, 96, torch.bfloat16)
    monkeypatch.setattr(expanded, "SLICE_VALUES", 1000)
    monkeypatch.setattr(reference, "SLICE_VALUES", 1000)
    assert_product(linear(x, w), x, values_of(w))
    assert_product(reference.linear(x, w), x, values_of(w))


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (0, 96), (2, 40, 96)])
def test_leading_dimensions_are_kept(shape):
    w, x = random_weight(7, 96), random_x(1, math.prod(shape), torch.bfloat16).reshape(shape)
    for y in (linear(x, w), packed(x, w)):
        assert y.shape == (*shape[:-1], 7) and y.dtype == x.dtype
        assert_product(y.reshape(-1, 7), x.reshape(-1, 96), values_of(w))


@pytest.mark.parametrize("m", [3, 70])
def test_x_and_w_need_not_be_contiguous(m):
    w, x = random_weight(14, 96), random_x(96, 2 * m, torch.bfloat16).T[::2]
    every_other = BlockTensor("mxfp4", w.blocks[::2], w.scales[::2])
    assert_product(linear(x, every_other), x, values_of(w)[::2])
    assert_product(packed(x, every_other), x, values_of(w)[::2])


def test_a_dense_weight():
    w, x = random_x(7, 40, torch.bfloat16), random_x(3, 40, torch.float32)
    assert_product(linear(x, w), x, w.double().numpy())
    assert_product(linear(x.bfloat16(), w), x.bfloat16(), w.double().numpy())
    assert_product(reference.linear(x, w), x, w.double().numpy())


@pytest.mark.parametrize(
    ("x", "w", "activation", "error", "words"),
    [
        (torch.ones(2, 64), random_weight(3, 32), None, FourfoldError, "last dimensions"),
        (torch.ones(2, 32, dtype=torch.float16), random_weight(3, 32), None, FourfoldError, "float16"),
        (torch.ones(()), random_weight(3, 32), None, FourfoldError, "one matrix"),
        (torch.ones(2, 32), torch.ones(2, 3, 32), None, FourfoldError, "one matrix"),
        (torch.ones(2, 32), torch.ones(3, 32, device="meta"), None, FourfoldError, "meta"),
        (torch.ones(2, 32), random_weight(3, 32), "mxfp5", UsageError, "mxfp5"),
        (torch.ones(2, 40), torch.ones(3, 40), "mxfp4", FourfoldError, "multiple of 32"),
    ],
)
def test_refusals_name_the_value(x, w, activation, error, words):
    with pytest.raises(error, match=words):
        linear(x, w, activation)
    with pytest.raises(error, match=words):
        packed(x, w, activation)


def test_without_the_extension_everything_works_in_torch():
    program = """
import sys
sys.modules["fourfold.kernels.cpu._native"] = None
import torch
from fourfold.formats import get_format
from fourfold.kernels import cpu_features, linear, native_available, native_problem, pack
from fourfold.kernels import reference, set_threads, threads
assert not native_available() and native_problem() and cpu_features() == {} and threads() == 1
set_threads(2)
w, x = get_format("mxfp4").quantize(torch.randn(33, 96)), torch.randn(3, 96)
assert pack(w) is w
torch.testing.assert_close(linear(x, w), reference.linear(x, w))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
