"""Smoothing: the layer's function stays, every reader is scaled, and outliers that were put in are undone."""

import pytest
import torch
from compress_models import change_tensor, read_all
from layer_at_work import at_work, output_error, recipe_of, run_passes, tokens
from tiny_models import build_architecture, build_tiny_model
from torch import nn

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import quantize
from fourfold.compress.calibrated import smoothing
from fourfold.compress.calibrated.folding import Fold, fold_all, norm_offset
from fourfold.compress.calibrated.groups import exact_forward, find_groups
from fourfold.compress.calibrated.smoothing import OutputError, observe
from fourfold.compress.passes.rtn import round_to_nearest
from fourfold.compress.pipeline import check_recipe
from fourfold.core.errors import UsageError
from fourfold.formats import get_format, hadamard

SMOOTHERS = ["smoothquant", "awq", "autosmoothquant"]
ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
EXPERTS = {f"mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up")}
READERS = {
    "llama": {"input_layernorm": ATTENTION, "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"}},
    "mistral": {"input_layernorm": ATTENTION},
    "qwen2": {"self_attn.v_proj": {"self_attn.o_proj"}, "mlp.up_proj": {"mlp.down_proj"}},
    "qwen3": {"input_layernorm": ATTENTION, "mlp.up_proj": {"mlp.down_proj"}},
    "qwen3_moe": {
        "post_attention_layernorm": {"mlp.gate", *EXPERTS},
        "mlp.experts.3.up_proj": {"mlp.experts.3.down_proj"},
    },
    "mixtral": {"post_attention_layernorm": {"mlp.gate", *EXPERTS}},
    "gemma3_text": {"pre_feedforward_layernorm": {"mlp.gate_proj", "mlp.up_proj"}},
    "qwen3_next": {
        "input_layernorm": {"linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"},
        "linear_attn.norm": {"linear_attn.out_proj"},
        "post_attention_layernorm": {
            "mlp.gate",
            "mlp.shared_expert_gate",
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
            *EXPERTS,
        },
    },
    "gpt_oss": {"post_attention_layernorm": {"mlp.router", *EXPERTS}},
}
CALIBRATION = tokens(4, 32)


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """Layer 0 of an architecture before its passes; each model is built once."""
    folder, built = tmp_path_factory.mktemp("models"), {}

    def get(model_type, *passes, activation="mxfp4"):
        if model_type not in built:
            built[model_type] = build_architecture(folder / model_type, model_type)
        recipe = recipe_of(*passes, activation=activation)
        store = folder / "store"
        return at_work(built[model_type], store, recipe, CALIBRATION), recipe

    return get


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A llama of one layer, and the same with 2 of its channels 60 times as loud behind each norm."""
    folder = tmp_path_factory.mktemp("loud")
    changes = {"num_hidden_layers": 1, "initializer_range": 0.1}
    plain, injected = (build_tiny_model(folder / name, **changes) for name in ("plain", "injected"))
    readers = {"input_layernorm": ATTENTION, "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"}}
    for norm, names in readers.items():
        change_tensor(injected, f"model.layers.0.{norm}.weight", lambda w: _times(w, 64))
        for name in names:
            change_tensor(injected, f"model.layers.0.{name}.weight", lambda w: _times(w, 1 / 64))
    return plain, injected


def _times(weight, factor):
    weight = weight.clone()
    weight[..., [5, 41]] *= factor
    return weight


@pytest.mark.parametrize("model_type", READERS)
def test_smoothing_finds_every_reader_and_keeps_the_layers_function(layer, model_type):
    work, recipe = layer(model_type, "smoothquant", "rtn")
    trace = find_groups(work)
    found = {group.source: set(group.readers) for group in trace.groups}
    assert found.items() >= READERS[model_type].items()
    before = {name: p.clone() for name, p in work.module.named_parameters()}
    run_passes(work, recipe)
    assert not work.notes
    after = dict(work.module.named_parameters())
    for name in {f"{n}.weight" for source, readers in found.items() for n in (source, *readers)}:
        assert not torch.equal(before[name], after[name]), name
    for group in trace.groups:
        if not isinstance(work.module.get_submodule(group.source), nn.Linear):
            weight = after[f"{group.source}.weight"]
            assert torch.equal(weight, weight.bfloat16().float()), "the file could not hold it"
    scale = float(trace.output.abs().max())
    torch.testing.assert_close(exact_forward(work, trace.hidden), trace.output, rtol=0, atol=1e-4 * scale)


def test_gpt_oss_adds_one_to_up_so_that_up_takes_no_scale(layer):
    work, _ = layer("gpt_oss", "smoothquant", "rtn")
    assert not [group.source for group in find_groups(work).groups if "up_proj" in group.source]


def test_where_a_bias_is_divided_too_scales_are_powers_of_two(layer):
    work, recipe = layer("qwen2", "smoothquant", "rtn")
    before = work.module.get_submodule("self_attn.v_proj").bias.clone()
    run_passes(work, recipe)
    ratio = before / work.module.get_submodule("self_attn.v_proj").bias
    assert torch.equal(ratio, ratio.log2().round().exp2())
    assert len(ratio.unique()) > 1


class AlsoReads(nn.Module):
    """An MLP beside which something else reads the norm's output."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x) + x.sigmoid()


def test_a_group_with_a_reader_that_nobody_knows_is_left_alone_and_noted(layer):
    work, recipe = layer("llama", "smoothquant", "rtn")
    work.module.mlp = AlsoReads(work.module.mlp)
    trace = find_groups(work)
    before = {name: p.clone() for name, p in work.module.named_parameters()}
    run_passes(work, recipe)
    assert len(work.notes) == 1
    assert "post_attention_layernorm: something else reads" in work.notes[0]
    after = dict(work.module.named_parameters())
    assert torch.equal(before["post_attention_layernorm.weight"], after["post_attention_layernorm.weight"])
    assert not torch.equal(before["input_layernorm.weight"], after["input_layernorm.weight"])
    torch.testing.assert_close(exact_forward(work, trace.hidden), trace.output, rtol=1e-4, atol=1e-5)


class Squared(nn.RMSNorm):
    """Multiplies by the square of its weight."""

    def forward(self, x):
        return super().forward(x) * self.weight


def test_a_norm_that_multiplies_in_another_way_takes_no_scale(layer):
    work, recipe = layer("llama", "smoothquant", "rtn")
    norm = Squared(64)
    norm.weight.data.copy_(work.module.input_layernorm.weight + 0.5)
    work.module.input_layernorm = norm.requires_grad_(False)
    assert norm_offset(norm) == 0  # zero of both: only what the layer computes tells
    run_passes(work, recipe)
    assert "input_layernorm" in work.notes[0]
    shifted = nn.RMSNorm(64).requires_grad_(False)
    shifted.register_forward_hook(lambda module, args, out: out + 0.3)
    assert norm_offset(shifted) is None


def test_a_norm_around_zero_is_divided_and_its_rounding_made_up_for(layer):
    work, _ = layer("gemma3_text", "smoothquant", "rtn")
    assert norm_offset(work.module.input_layernorm) == 1
    trace = find_groups(work)
    group = next(g for g in trace.groups if g.source == "input_layernorm")
    fold_all(work, trace, [Fold(group, torch.linspace(0.2, 30, 64))])
    assert not work.notes
    torch.testing.assert_close(exact_forward(work, trace.hidden), trace.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", [None, "hadamard"])
def test_the_error_that_is_searched_is_the_error_of_the_served_linear_layers(layer, transform):
    work, _ = layer("llama", "smoothquant", "rtn")
    for name, scheme in work.schemes.items():
        work.schemes[name] = scheme.model_copy(update={"input_transform": transform})
    group = next(g for g in find_groups(work).groups if g.source == "post_attention_layernorm")
    members = observe(work, [group])[group.source]
    scales = torch.linspace(0.5, 2, 64)
    error = OutputError(group, members, activations=True, rows=slice(None))
    total, cells = 0.0, torch.zeros(2)
    for member in members:
        matrix = torch.block_diag(hadamard(), hadamard()) if transform else torch.eye(64)
        x, weight = member.seen.rows / scales @ matrix, member.linear.weight * scales @ matrix
        served, rounded = (get_format("mxfp4").fake_quantize(value) for value in (x, weight))
        exact = member.seen.rows @ member.linear.weight.T
        total += float((served @ rounded.T - exact).square().sum() / exact.square().sum())
        for cell, part in enumerate((slice(0, 32), slice(32, 64))):
            lost = served[:, part] @ rounded[:, part].T - x[:, part] @ weight[:, part].T
            cells[cell] += lost.square().sum() / exact.square().sum()
    assert error.whole_error(scales) == pytest.approx(total, rel=1e-3)
    torch.testing.assert_close(error.by_cell(scales), cells, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("heads", "whole"), [(2, True), (4, False)])
def test_heads_that_share_values_share_scales(tmp_path, heads, whole):
    """A key-value head of 32 channels is a block of its own; one of 16 is not, and all choose together."""
    changes = {"num_hidden_layers": 1, "head_dim": 64 // heads, "num_attention_heads": 2 * heads}
    model = build_tiny_model(tmp_path / "model", num_key_value_heads=heads, **changes)
    work = at_work(model, tmp_path / "store", recipe_of("awq", "rtn"), CALIBRATION)
    group = next(g for g in find_groups(work).groups if g.source == "self_attn.v_proj")
    assert group.channels == 64
    assert len(group.spread) == 128
    size = 64 // heads
    assert torch.equal(group.spread[:size], group.spread[size : 2 * size])
    members = observe(work, [group])[group.source]
    error = OutputError(group, members, activations=True, rows=slice(None))
    assert error.by_cell(torch.ones(64)).shape == ((2,) if whole else (1,))


@pytest.mark.parametrize("chosen", SMOOTHERS)
def test_outliers_that_were_put_in_are_undone(loud, tmp_path, chosen):
    """W4A4 by rounding loses much more on the model with outliers; after smoothing it hardly does."""
    errors = {}
    for name, folder in zip(("plain", "injected"), loud, strict=True):
        for passes in (("rtn",), (chosen, "rtn")):
            recipe = recipe_of(*passes, activation="mxfp4")
            work = at_work(folder, tmp_path / f"{name}-{len(passes)}", recipe)
            original = [exact_forward(work, hidden) for hidden in work.inputs]
            run_passes(work, recipe)
            work.round_rest(round_to_nearest)
            errors[name, len(passes)] = output_error(work, original)
    assert errors["injected", 1] > 1.5 * errors["plain", 1], "the outliers do no harm"
    gap = errors["injected", 1] - errors["plain", 1]
    closed = 1 - (errors["injected", 2] - errors["plain", 1]) / gap
    assert closed > 0.6, errors


def test_only_some_experts_and_batches_are_looked_at_and_the_others_follow(layer, monkeypatch):
    monkeypatch.setattr(smoothing, "SEARCHED_EXPERTS", 1)
    monkeypatch.setattr(smoothing, "ROWS", 16)
    work, recipe = layer("mixtral", "autosmoothquant", "rtn")
    trace = find_groups(work)
    before = work.module.get_submodule("mlp.experts.2.up_proj").weight.clone()
    run_passes(work, recipe)
    assert not torch.equal(before, work.module.get_submodule("mlp.experts.2.up_proj").weight)
    torch.testing.assert_close(exact_forward(work, trace.hidden), trace.output, rtol=1e-4, atol=1e-5)


def test_an_expert_that_saw_nothing_is_left_as_it_is(layer):
    work, recipe = layer("qwen3_moe", "autosmoothquant", "rtn")
    gate = work.module.mlp.gate
    router = type(gate).forward

    def avoid_expert_3(hidden):
        logits, _, _ = router(gate, hidden)
        scores, chosen = logits[:, :3].softmax(-1).topk(2)
        return logits, scores, chosen

    gate.forward = avoid_expert_3
    before = work.module.get_submodule("mlp.experts.3.down_proj").weight.clone()
    run_passes(work, recipe)
    assert torch.equal(before, work.module.get_submodule("mlp.experts.3.down_proj").weight)


def test_a_smoothed_checkpoint_is_an_ordinary_one_and_is_made_the_same_twice(loud, tmp_path):
    _, injected = loud
    recipe = recipe_of("autosmoothquant", "rtn", activation="mxfp8-e4m3")
    for name in ("one", "two"):
        quantize(injected, tmp_path / name, recipe, calibration=CALIBRATION)
    one, two = (read_all(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(one[norm], read_all(injected)[norm])
    assert one[norm].dtype is torch.bfloat16
    scheme = open_checkpoint(tmp_path / "one").quantization.layer("model.layers.0.self_attn.q_proj")
    assert scheme is not None
    assert scheme.input_transform is None


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ((("smoothquant", {"alpha": 1.5}), "rtn"), "alpha"),
        ((("autosmoothquant", {"alpha": 0.5}), "rtn"), "alpha"),
        (("smoothquant", "awq", "rtn"), "undo the first"),
        (("rtn", "awq"), "rounds"),
    ],
)
def test_what_makes_no_sense_is_refused(passes, reason):
    entries = [p if isinstance(p, str) else {p[0]: p[1]} for p in passes]
    with pytest.raises(UsageError, match=reason):
        check_recipe(recipe_of(*entries))
