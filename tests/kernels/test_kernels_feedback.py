"""Inputs rounded with feedback: C++ and Triton equal torch, and products lose less than by nearest values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.formats import get_format
from fourfold.kernels import native_available
from fourfold.kernels.feedback import InputFeedback, group_of, round_in_torch, takes_feedback

FORMATS = ["mxfp4", "mxfp6-e2m3", "mxfp8-e5m2"]


def drawn(rows: int, width: int, seed: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.rand(width, generator=generator) + 0.05
    return (torch.randn(rows, width, generator=generator) * channels).to(device)


@pytest.mark.skipif(not native_available(), reason="the C++ extension is not built")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("out", "width", "rows"), [(7, 32, 1), (96, 96, 17), (40, 128, 33), (300, 320, 5)])
def test_cpp_rounds_as_torch_does(name, out, width, rows):
    feedback = InputFeedback(drawn(out, width, 1), name, 128)
    x = drawn(rows, width, 2)
    x[rows // 2, : width // 2] = 0
    expected = round_in_torch(x, feedback.steps, feedback.form)
    # sums run in another order, so that what lies between two values may fall either way
    assert (feedback(x) != expected).float().mean() < 0.002
    assert torch.allclose(feedback(x)[:, :1], expected[:, :1])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 80), st.sampled_from([32, 64, 96, 256]), st.integers(0, 99))
def test_what_comes_is_in_the_format_and_loses_less_of_the_product(rows, width, seed):
    weight, x = drawn(48, width, seed), drawn(rows, width, seed + 100)
    form = get_format("mxfp4")
    rounded = round_in_torch(x, InputFeedback(weight, "mxfp4", 128).steps, form)
    again = form.quantize(rounded, "ceil").dequantize()
    assert torch.equal(form.fake_quantize(rounded), rounded) or torch.equal(again, rounded)
    if rows > 40:  # few rows may be unlucky
        lost = ((x - rounded) @ weight.T).square().sum()
        nearest = ((x - form.fake_quantize(x)) @ weight.T).square().sum()
        assert lost < nearest


def test_a_weight_whose_columns_know_nothing_of_each_other_asks_for_nearest_values():
    x = drawn(9, 64, 3)
    for weight in (torch.eye(64), torch.zeros(8, 64)):
        feedback = InputFeedback(weight, "mxfp4", 64)
        assert torch.equal(feedback(x), feedback.form.fake_quantize(x))


def test_updates_keep_their_memory_and_follow_the_weight():
    one, other, x = drawn(50, 128, 4), drawn(50, 128, 5), drawn(20, 128, 6)
    feedback = InputFeedback(one, "mxfp4", 128)
    place, before = feedback.steps.data_ptr(), feedback(x)
    feedback.update(other)
    assert feedback.steps.data_ptr() == place
    assert torch.equal(feedback(x), InputFeedback(other, "mxfp4", 128)(x))
    assert not torch.equal(feedback(x), before)


def test_what_is_not_finite_stays_in_its_row():
    feedback, x = InputFeedback(drawn(50, 128, 7), "mxfp4", 128), drawn(20, 128, 8)
    expected, broken = feedback(x), x.clone()
    broken[3, 40] = torch.nan
    found = feedback(broken)
    others = torch.arange(20) != 3
    assert torch.equal(found[others], expected[others])
    assert found[3, 40:].isnan().all()  # and with it the whole row of the product


def test_dtypes_shapes_and_groups():
    feedback = InputFeedback(drawn(50, 192, 9), "mxfp4", 128)
    assert feedback.group == group_of(192, 128) == 64
    x = drawn(6, 192, 10).bfloat16().view(2, 3, 192)
    assert feedback(x).dtype == torch.bfloat16 and feedback(x).shape == x.shape
    assert torch.equal(feedback(x).float(), feedback(x.float()))
    assert feedback(x[:0]).shape == (0, 3, 192)
    assert [takes_feedback(name) for name in ("mxfp4", "mxint8", "nvfp4", "fp8-token", None)] == [
        True
    ] + 4 * [False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [96, 512, 576])
def test_triton_rounds_as_torch_does(width):
    feedback = InputFeedback(drawn(300, width, 11, "cuda"), "mxfp4", 128)
    x = drawn(77, width, 12, "cuda")
    x[3] = 0
    expected = round_in_torch(x, feedback.steps, feedback.form)
    assert (feedback(x) != expected).float().mean() < 0.002
