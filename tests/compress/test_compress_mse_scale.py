"""Block scales chosen by the error they leave in a layer's output."""

import pytest
import torch
from layer_at_work import at_work, build_model, output_error, recipe_of, run_passes

from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.scale_search import MeanSquares, global_scale, mean_squares, search_scales
from fourfold.compress.passes.rtn import round_to_nearest
from fourfold.formats import format_names, get_format


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


def weight_and_importance() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 128, generator=generator) * torch.rand(16, 128, generator=generator).exp2()
    weight[3, 32:64] = 0
    return weight, torch.randn(128, generator=generator).square() + 0.01


def weighted_error(weight, name, scales, importance) -> torch.Tensor:
    """Per scale."""
    form = get_format(name)
    values = form.quantize_with_scales(weight, scales, global_scale(weight, form)).dequantize()
    error = (values - weight).square() * importance
    return error.view(scales.numel(), -1).sum(-1) if scales.numel() > 1 else error.sum().view(1)


@pytest.mark.parametrize("name", format_names())
def test_no_candidate_is_better(name):
    weight, importance = weight_and_importance()
    form = get_format(name)
    found = weighted_error(weight, name, search_scales(weight, form, importance), importance)
    whole = global_scale(weight, form)
    start = form.multipliers(form.scales(weight, "floor" if form.default_rule else None), whole)
    factors = (0.25, 0.5, 1.0, 2.0, 4.0) if form.default_rule else (0.6, 0.8, 0.95, 1.0)
    for factor in factors:
        other = form.nearest_scales(start * factor, whole)
        assert bool((found <= weighted_error(weight, name, other, importance) * (1 + 1e-5)).all())
    nearest = weighted_error(weight, name, form.scales(weight), importance)
    assert found.sum() <= nearest.sum()
    if name in ("mxfp4", "nvfp4", "mxint8", "int4-g32"):  # with more exponent bits scales hardly matter
        assert found.sum() < 0.98 * nearest.sum()


def test_without_importance_it_is_no_worse_than_the_rule_mse():
    weight, _ = weight_and_importance()
    ones = torch.ones(weight.shape[-1])
    form = get_format("mxfp4")
    found = weighted_error(weight, "mxfp4", search_scales(weight, form, ones), ones)
    assert bool((found <= weighted_error(weight, "mxfp4", form.scales(weight, "mse"), ones) * 1.00001).all())


def test_mean_squares_are_those_of_the_inputs_as_served(model, tmp_path):
    work = at_work(model, tmp_path, recipe_of("mse-scale", activation="mxfp4"))
    found = mean_squares(work)
    seen: dict[str, torch.Tensor] = {}
    work.observe(["model.layers.0.mlp.up_proj"], seen.__setitem__)
    served = get_format("mxfp4").fake_quantize(seen["model.layers.0.mlp.up_proj"])
    torch.testing.assert_close(found["model.layers.0.mlp.up_proj"], served.square().mean(0))
    assert not work.notes


def test_a_layer_that_saw_no_token_counts_every_input_alike():
    assert MeanSquares({"expert": CalibratedLinear(32, 4)})["expert"].eq(1).all()


@pytest.mark.parametrize("weight", ["mxfp4", "nvfp4", "int4-g32", "fp8-tensor"])
def test_the_layer_gets_closer_to_the_original(model, tmp_path, weight):
    errors = {}
    for chosen in ("rtn", "mse-scale"):
        work = at_work(model, tmp_path / chosen, recipe_of("mse-scale", weight=weight))
        original = work.outputs(work.inputs)
        run_passes(work, recipe_of(chosen, weight=weight))
        work.round_rest(round_to_nearest)
        errors[chosen] = output_error(work, original)
    assert errors["mse-scale"] < 0.97 * errors["rtn"]
