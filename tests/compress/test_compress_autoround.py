"""AutoRound and the learned rounding beneath it."""

import pytest
import torch
from compress_models import build_moe, change_tensor, read_all
from layer_at_work import at_work, build_model, output_error, recipe_of, run_passes, tokens

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import quantize
from fourfold.compress.calibrated.learned_rounding import LearnedRounding
from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.passes.autoround import Options, loss_of, start_at_gptq
from fourfold.compress.passes.rtn import round_to_nearest
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import LayerScheme
from fourfold.formats import get_format

FORMATS = ["mxfp4", "mxfp6-e2m3", "mxint8", "nvfp4", "int4-g32", "fp8-tensor", "fp8-channel"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


def error_of(model, folder, *passes, **formats) -> float:
    work = at_work(model, folder, recipe_of("autoround", **formats))
    original = work.outputs(work.inputs)
    run_passes(work, recipe_of(*passes, **formats))
    work.round_rest(round_to_nearest)
    return output_error(work, original)


@pytest.mark.parametrize("activation", [None, "mxfp4"])
def test_the_layer_gets_closer_to_the_original(model, tmp_path, activation):
    nearest = error_of(model, tmp_path / "a", activation=activation)
    learned = error_of(
        model, tmp_path / "b", {"autoround": {"steps": 50, "loss": "plain"}}, activation=activation
    )
    assert learned < (0.5 if activation is None else 0.7) * nearest


@pytest.mark.parametrize("weight", FORMATS[1:])
def test_any_block_format_can_be_learned(model, tmp_path, weight):
    nearest = error_of(model, tmp_path / "a", weight=weight)
    learned = error_of(model, tmp_path / "b", {"autoround": {"steps": 20}}, weight=weight)
    assert learned < 0.95 * nearest


def test_a_step_that_leads_astray_is_not_kept(model, tmp_path):
    start = error_of(model, tmp_path / "a", "mse-scale")
    astray = {"autoround": {"steps": 2, "lr": 40.0, "scale_lr": 30.0, "checks": 2, "loss": "plain"}}
    assert error_of(model, tmp_path / "b", astray) == pytest.approx(start, rel=1e-6)


def test_it_learns_on_from_gptq(model, tmp_path):
    recipe = recipe_of({"autoround": {"start": "gptq", "steps": 1, "lr": 1e-6, "loss": "plain"}})
    gptq = run_passes(at_work(model, tmp_path / "a", recipe), recipe_of("gptq")).blocks
    started = run_passes(at_work(model, tmp_path / "b", recipe), recipe).blocks
    for name, blocks in gptq.items():
        same = blocks.dequantize() == started[name].dequantize()
        assert same.float().mean() > 0.98, name
    further = {"autoround": {"start": "gptq", "steps": 100, "loss": "plain"}}
    assert error_of(model, tmp_path / "c", further) < 0.9 * error_of(model, tmp_path / "d", "gptq")


def test_every_weight_learns_on_from_gptq(model, tmp_path):
    """None of the products that GPTQ recalls stands in the way of a gradient."""
    few = tokens(count=1, length=16)  # all products of which are recalled
    work = at_work(model, tmp_path / "a", recipe_of({"autoround": {"start": "gptq"}}), few)
    targets = work.outputs(work.inputs)
    learned = start_at_gptq(work, Options(start="gptq"))
    for rounding in learned.values():
        rounding.linear.weight.requires_grad_(True)
        rounding.write()
    loss_of(work.forward(work.inputs[0]), targets[0], "plain").backward()
    assert all(rounding.gradients() is not None for rounding in learned.values())


def test_an_expert_that_no_token_reaches_is_learned_from_the_nearest(tmp_path):
    model = build_moe(tmp_path / "m", "mixtral")
    work = at_work(model, tmp_path / "a", recipe_of({"autoround": {"start": "gptq", "steps": 1}}))
    lonely = next(name for name in work.linears if ".experts.1." in name)
    observe = work.observe
    work.observe = lambda names, *rest: observe([name for name in names if name != lonely], *rest)
    run_passes(work, recipe_of({"autoround": {"start": "gptq", "steps": 1}}))
    assert set(work.blocks) == set(work.schemes) and lonely in work.blocks


def test_a_layer_that_computes_no_numbers_is_told(model, tmp_path):
    work = at_work(model, tmp_path / "a", recipe_of("autoround"))
    work.inputs[0][0, 0] = torch.inf
    with pytest.raises(FourfoldError, match=r"model\.layers\.0 is nan.*original model"):
        run_passes(work, recipe_of("autoround"))


def test_bytes_and_notes_are_the_same_twice(model, tmp_path):
    recipe = recipe_of({"autoround": {"steps": 5}}, activation="mxfp8-e4m3")
    for out in ("a", "b"):
        quantize(model, tmp_path / out, recipe, calibration=tokens())
    first, second = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert any("model.layers.0: autoround" in note for note in open_checkpoint(tmp_path / "a").card().notes)


@pytest.mark.parametrize("chosen", ["autoround", "mse-scale", "distill"])
def test_a_weight_that_is_not_a_number_is_named(tmp_path, chosen):
    model = build_model(tmp_path / "model", num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensor(model, name, lambda w: w.index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(FourfoldError, match=f"{name} holds NaN"):
        quantize(model, tmp_path / "out", recipe_of(chosen), calibration=tokens())


@pytest.mark.parametrize("chosen", ["gptq", "distill"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"])
def test_what_is_kept_and_not_a_number_is_named_too(tmp_path, chosen, name):
    model = build_model(tmp_path / "model", num_hidden_layers=1)
    change_tensor(model, name, lambda w: w.index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(FourfoldError, match=f"{name} holds NaN"):
        quantize(model, tmp_path / "out", recipe_of(chosen), calibration=tokens())


def rounding_of(weight: str, seed: int = 0, reach: float = 0.5) -> LearnedRounding:
    generator = torch.Generator().manual_seed(seed)
    linear = CalibratedLinear(64, 8, bias=False)
    linear.weight.data = torch.randn(8, 64, generator=generator) * 0.05
    scheme = LayerScheme(weight=weight)
    return LearnedRounding(linear, scheme, get_format(weight).scales(linear.weight), reach)


@pytest.mark.parametrize("weight", FORMATS)
def test_it_starts_at_the_nearest(weight):
    rounding = rounding_of(weight)
    expected = get_format(weight).quantize(rounding.linear.weight)
    torch.testing.assert_close(rounding.blocks().dequantize(), expected.dequantize(), rtol=1e-3, atol=0)
    rounding.write()
    assert torch.equal(rounding.linear.weight.data, rounding.blocks().dequantize())


@pytest.mark.parametrize("weight", FORMATS)
@pytest.mark.parametrize("reach", [0.5, 2.0])
def test_gradients_pass_straight_through(weight, reach):
    rounding = rounding_of(weight, reach=reach)
    rounding.offset.uniform_(-reach, reach, generator=torch.Generator().manual_seed(1))
    rounding.linear.weight.grad = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    found = rounding.gradients()
    assert found is not None
    # the same by autograd, every rounding replaced by what it did to its argument
    offset, log2_scale = rounding.offset.requires_grad_(), rounding.log2_scale.requires_grad_()
    held = rounding.form.multipliers(rounding.scales(), rounding.whole)
    wanted_scale = log2_scale.exp2()
    scale = (wanted_scale * (held / wanted_scale).detach()).reshape(-1, 1)
    y = rounding.runs / scale
    step = rounding.form.element.step(y.detach())
    moved = y + offset * step
    rounded = rounding.values() / scale.detach()
    inside = moved.detach().abs() <= rounding.form.element.max + step / 2
    through = torch.where(inside, moved + (rounded - moved).detach(), rounded)
    (through * scale * rounding.linear.weight.grad.view_as(through)).sum().backward()
    torch.testing.assert_close(found[0], offset.grad)
    torch.testing.assert_close(found[1], log2_scale.grad)


def test_offsets_only_choose_up_or_down():
    rounding = rounding_of("mxfp4")
    scale = rounding.form.multipliers(rounding.scales()).reshape(-1, 1)
    element = get_format("mxfp4").element
    grid = element.decode(torch.arange(16, dtype=torch.uint8)).unique()
    for offset in (-0.5, -0.2, 0.3, 0.5):
        rounding.offset.fill_(offset)
        y, q = rounding.runs / scale, rounding.values() / scale
        below = grid[(torch.searchsorted(grid, y, right=True) - 1).clamp_min(0)]
        above = grid[torch.searchsorted(grid, y).clamp_max(len(grid) - 1)]
        assert bool(((q == below) | (q == above)).all())
