"""The pass input-feedback: what it writes, who reads it, and what it refuses."""

import json
import shutil

import pytest
import torch
from compress_models import build_moe
from layer_at_work import build_model, recipe_of, tokens

from fourfold.checkpoint import open_checkpoint
from fourfold.checkpoint.convert import convert
from fourfold.compress import quantize
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.whole import WholeModel, divergence_of
from fourfold.compress.passes import distill
from fourfold.compress.pipeline import check_recipe, prepare
from fourfold.compress.resolve import open_source, resolve
from fourfold.core.errors import FourfoldError, UsageError

W4A4 = {"activation": "mxfp4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("feedback") / "out"
    recipe = recipe_of("block-rotation", {"input-feedback": {"group": 64}}, "rtn", **W4A4)
    quantize(model, out, recipe, calibration=tokens())
    return out


def whole(model, *passes) -> WholeModel:
    recipe = recipe_of(*passes, "rtn", **W4A4)
    return WholeModel(
        Skeleton(prepare(recipe, resolve(open_source(model), recipe).model), torch.device("cpu"))
    )


def test_the_scheme_survives_both_dialects_and_the_card_tells(folder, tmp_path):
    first = open_checkpoint(folder)
    assert {scheme.input_feedback for scheme in first.quantization.layers.values()} == {64}
    assert "input_feedback" not in first.config
    assert any("feedback" in note for note in first.card().notes)
    convert(folder, tmp_path / "quark", "quark")
    assert open_checkpoint(tmp_path / "quark").quantization == first.quantization


def test_rounding_inputs_alone_costs_less_with_feedback(model):
    ids = tokens(6).token_ids
    wanted = whole(model)(ids)
    costs = {}
    for passes in ((), ("input-feedback",)):
        rounded = whole(model, *passes)
        rounded.round_inputs()
        with torch.no_grad():
            costs[passes] = divergence_of(wanted, rounded(ids)).item()
    assert costs["input-feedback",] < 0.95 * costs[()]


def test_training_follows_the_weights(model, monkeypatch):
    monkeypatch.setattr(distill, "REFRESH_STEPS", 2)
    recipe = recipe_of("input-feedback", "distill", **W4A4)
    skeleton = Skeleton(prepare(recipe, resolve(open_source(model), recipe).model), torch.device("cpu"))
    ids = tokens(6).token_ids
    calibration = type(tokens(2))(torch.cat([ids, ids]), "twice", 0)
    options = distill.Options.model_validate(
        {"steps": 20, "sequences": 6, "holdout": 0.5, "lr": 2e-3, "micro": 6}
    )
    first, least = distill.learn(skeleton, calibration, options, lambda model: None)[distill.REPORT].tolist()
    assert least < first


def test_experts_are_left_to_the_nearest(tmp_path):
    quantize(
        build_moe(tmp_path / "moe", "qwen3_moe"),
        tmp_path / "out",
        recipe_of("input-feedback", "rtn", **W4A4),
        calibration=tokens(),
    )
    layers = open_checkpoint(tmp_path / "out").quantization.layers
    groups = {".experts." in name: scheme.input_feedback for name, scheme in layers.items()}
    assert groups[True] is None and groups[False] is not None


def test_what_makes_no_sense_is_refused(model, folder, tmp_path):
    with pytest.raises(UsageError, match="finds no input"):
        quantize(model, tmp_path / "out", recipe_of("input-feedback", "rtn"), calibration=tokens())
    with pytest.raises(UsageError, match="only a pass that rounds"):
        check_recipe(recipe_of("input-feedback", "block-rotation", "rtn", **W4A4))
    with pytest.raises(UsageError, match="group"):
        check_recipe(recipe_of({"input-feedback": {"group": 48}}, "rtn", **W4A4))


@pytest.mark.parametrize("said", [{"48": []}, {"64": ["model.nowhere"]}, ["64"]])
def test_a_config_that_cannot_be_understood_is_refused(folder, tmp_path, said):

    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"input_feedback": said}))
    with pytest.raises(FourfoldError, match=r"input_feedback in config\.json"):
        open_checkpoint(copy)
