"""Mixtures of experts: which tensors are rounded, and that fused experts come apart the right way round."""

import json
import shutil

import pytest
import torch
from compress_models import build_moe, fuse_as_transformers, read_all

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import load_recipe, plan, quantize
from fourfold.compress.experts import unfuse
from fourfold.compress.resolve import resolve
from fourfold.core.errors import FourfoldError
from fourfold.formats import get_format

ATTENTION = {f"self_attn.{p}_proj" for p in "qkvo"}


def experts(stem: str, *projections: str) -> set[str]:
    return {f"{stem}.experts.{e}.{p}" for e in range(4) for p in projections}


EXPECTED = {
    "qwen3_moe": ATTENTION | experts("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ATTENTION | experts("block_sparse_moe", "w1", "w2", "w3"),
    "granitemoe": ATTENTION | experts("block_sparse_moe", "w1", "w2", "w3"),
    "gpt_oss": ATTENTION | experts("mlp", "gate_proj", "up_proj", "down_proj"),
}
ROUTERS = {
    "qwen3_moe": "mlp.gate",
    "mixtral": "block_sparse_moe.gate",
    "granitemoe": "block_sparse_moe.router.layer",
    "gpt_oss": "mlp.router",
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    return {model_type: build_moe(folder / model_type, model_type) for model_type in EXPECTED}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_exactly_the_linear_layers_are_rounded(moe, model_type):
    dry = plan(moe[model_type])
    assert {t.name for t in dry.quantized} == {f"model.layers.0.{m}.weight" for m in EXPECTED[model_type]}
    reasons = {t.name: t.kept_because for t in dry.kept}
    assert reasons[f"model.layers.0.{ROUTERS[model_type]}.weight"] == "router"
    assert reasons["model.embed_tokens.weight"] == "embedding"
    assert reasons["lm_head.weight"] == "outside the decoder layers"


def test_the_card_says_who_does_not_read_experts_one_by_one(moe, tmp_path):
    (note,) = quantize(moe["gpt_oss"], tmp_path / "apart").card.notes
    assert "transformers finds none" in note
    kept = load_recipe("mxfp4").model_copy(update={"keep": ["*.experts.*"]})
    assert quantize(moe["gpt_oss"], tmp_path / "together", kept).card.notes == []
    assert quantize(moe["qwen3_moe"], tmp_path / "qwen").card.notes == []


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_the_layout_in_memory_gives_the_weights_of_the_layout_on_the_hub(moe, tmp_path, model_type):
    fused = fuse_as_transformers(moe[model_type], tmp_path / "fused")
    assert open_checkpoint(fused).info("model.layers.0.mlp.experts.gate_up_proj").shape[0] == 4
    apart = resolve(open_checkpoint(fused), load_recipe("mxfp4")).model
    released = read_all(moe[model_type])
    letters = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    pieces = [name for name in apart if ".experts." in name]
    assert len(pieces) == 12
    for name in pieces:
        original = name
        if model_type == "mixtral":
            stem, projection, _ = name.replace(".mlp.", ".block_sparse_moe.").rsplit(".", 2)
            original = f"{stem}.{letters[projection]}.weight"
        assert torch.equal(apart[name], released[original]), name


def test_experts_of_gpt_oss_compute_what_the_fused_ones_do(moe):
    stored = read_all(moe["gpt_oss"])
    prefix = "model.layers.0.mlp.experts"
    model = resolve(open_checkpoint(moe["gpt_oss"]), load_recipe("mxfp4")).model
    x = torch.randn(3, 64, dtype=torch.float64)
    for expert in range(4):
        fused = x @ stored[f"{prefix}.gate_up_proj"][expert].double()
        fused += stored[f"{prefix}.gate_up_proj_bias"][expert]
        for projection, expected in {"gate_proj": fused[:, 0::2], "up_proj": fused[:, 1::2]}.items():
            weight, bias = (
                model[f"{prefix}.{expert}.{projection}.{kind}"].double() for kind in ("weight", "bias")
            )
            assert torch.allclose(x @ weight.T + bias, expected)
        down = model[f"{prefix}.{expert}.down_proj.weight"]
        assert torch.equal(down.T, stored[f"{prefix}.down_proj"][expert])


def test_blocks_run_along_the_input_in_the_file_that_is_written(moe, tmp_path):
    quantize(moe["gpt_oss"], tmp_path / "out")
    written = open_checkpoint(tmp_path / "out").load("model.layers.0.mlp.experts.2.gate_proj.weight")
    fused = read_all(moe["gpt_oss"])["model.layers.0.mlp.experts.gate_up_proj"]
    expected = get_format("mxfp4").quantize(fused[2][:, 0::2].T.contiguous(), "even")
    assert torch.equal(written.scales, expected.scales)
    assert torch.equal(written.dequantize(), expected.dequantize())
    assert not any("gate_up_proj" in name for name in read_all(tmp_path / "out"))


def test_an_import_leaves_experts_fused(moe, tmp_path):
    quantize(moe["gpt_oss"], tmp_path / "out", "bf16", "plain")
    before, after = read_all(moe["gpt_oss"]), read_all(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_that_a_recipe_keeps_stay_fused(moe):
    recipe = load_recipe("mxfp4").model_copy(update={"keep": ["*.experts*"]})
    dry = plan(moe["gpt_oss"], recipe)
    assert {t.name for t in dry.quantized} == {f"model.layers.0.{m}.weight" for m in ATTENTION}
    assert "model.layers.0.mlp.experts.gate_up_proj" in {t.name for t in dry.kept}


def test_experts_that_stay_fused_are_told_to_readers_and_transformers_computes_with_them(moe, tmp_path):
    from transformers import AutoModelForCausalLM

    source = fuse_as_transformers(moe["qwen3_moe"], tmp_path / "fused")
    recipe = load_recipe("mxfp4").model_copy(update={"keep": ["*.experts*"]})
    out = tmp_path / "out"
    quantize(source, out, recipe)
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.experts" in ignore
    assert r"re:.*model\.layers\.0\.mlp\.experts\..*" in ignore
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    kept = open_checkpoint(source).load("model.layers.0.mlp.experts.down_proj")
    assert torch.equal(theirs.model.layers[0].mlp.experts.down_proj, kept)
    with torch.no_grad():
        assert theirs(torch.arange(8)[None]).logits.isfinite().all()


def test_experts_are_cut_together_when_some_are_rounded(moe):
    recipe = load_recipe("mxfp4").model_copy(update={"keep": ["*.experts.*.down_proj", "*.experts.1.*"]})
    dry = plan(moe["gpt_oss"], recipe)
    kept = {t.name: t.kept_because for t in dry.kept}
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj", "_bias")) for name in kept)
    prefix = "model.layers.0.mlp.experts"
    assert kept[f"{prefix}.0.down_proj.weight"] == "keep: *.experts.*.down_proj"
    assert kept[f"{prefix}.1.gate_proj.weight"] == "keep: *.experts.1.*"
    assert kept[f"{prefix}.0.down_proj.bias"] == "not a weight"
    assert sum(".experts." in t.name for t in dry.quantized) == 6


def test_fused_experts_that_are_named_stay_with_their_bias(moe):
    recipe = load_recipe("mxfp4").model_copy(update={"keep": ["*.experts.down_proj"]})
    kept = {tensor.name for tensor in plan(moe["gpt_oss"], recipe).kept}
    prefix = "model.layers.0.mlp.experts"
    assert {f"{prefix}.down_proj", f"{prefix}.down_proj_bias", f"{prefix}.3.gate_proj.bias"} <= kept


def test_a_pattern_may_mean_fused_experts_or_one_of_them(moe):
    names = ["0.down_proj", "*.up_proj", "gate_up_proj", "down_proj", "9.down_proj"]
    keep = [f"model.layers.0.mlp.experts.{name}" for name in names]
    (note,) = plan(moe["gpt_oss"], load_recipe("mxfp4").model_copy(update={"keep": keep})).notes
    assert f"matches what the recipe names: '{keep[-1]}'." in note


H, INNER = 64, 48
UP, DOWN = "l.layers.0.mlp.experts.gate_up_proj", "l.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("model_type", "up", "down", "transposed"),
    [
        ("qwen3_moe", (4, 2 * INNER, H), (4, H, INNER), False),
        ("llama4", (4, H, 2 * INNER), (4, INNER, H), True),
        ("qwen3_vl_moe", (4, H, 2 * INNER), (4, INNER, H), True),
        ("qwen3_vl_moe", (4, 2 * INNER, H), (4, H, INNER), False),
        ("gpt_oss", (4, H, 2 * H), (4, H, H), True),
        ("gpt_oss", (4, H, H), (4, H // 2, H), True),
        ("some_new_moe", (4, H, H), (4, H, H // 2), False),
    ],
)
def test_the_orientation_follows_from_shapes_then_from_the_model_type(model_type, up, down, transposed):
    config = {"model_type": "outer", "text_config": {"model_type": model_type, "hidden_size": H}}
    shapes = {UP: up, DOWN: down}
    for name in shapes:
        for piece in unfuse(name, shapes, config):
            assert piece.transposed == transposed
            out, width = piece.shape
            assert (out if "down_proj" in piece.name else width) == H


@pytest.mark.parametrize(
    ("model_type", "shapes"),
    [
        ("some_new_moe", {UP: (4, H, 2 * INNER)}),  # transposed, but gate before up or interleaved?
        ("some_new_moe", {UP: (4, 33, 77)}),
        ("qwen3_vl_moe", {DOWN: (4, H, H)}),
        ("qwen3_moe", {UP: (4, 2 * INNER, H), DOWN: (4, INNER, H)}),
    ],
)
def test_a_layout_that_stays_open_is_an_error(model_type, shapes):
    with pytest.raises(FourfoldError, match=r"cannot tell.*`keep` entry"):
        unfuse(next(iter(shapes)), shapes, {"model_type": model_type, "hidden_size": H})


def test_packed_gpt_oss_expands_to_the_layout_of_transformers(moe, tmp_path):
    """The weights that transformers' own expansion of the same blocks gives."""
    from safetensors.torch import save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source, prefix = tmp_path / "packed", "model.layers.0.mlp.experts"
    shutil.copytree(moe["gpt_oss"], source)
    stored = read_all(source)
    expected = {}
    for leaf in ("gate_up_proj", "down_proj"):
        packed = get_format("mxfp4").quantize(stored.pop(f"{prefix}.{leaf}").mT.contiguous())
        blocks = packed.blocks.unflatten(-1, (-1, 16))
        stored |= {f"{prefix}.{leaf}_blocks": blocks, f"{prefix}.{leaf}_scales": packed.scales}
        expected[leaf] = convert_moe_packed_tensors(blocks, packed.scales)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (source / "config.json").write_text(json.dumps(config))
    quantize(source, tmp_path / "out", "bf16", "plain")
    wide = read_all(tmp_path / "out")
    for leaf, value in expected.items():
        assert torch.equal(wide[f"{prefix}.{leaf}"], value)
