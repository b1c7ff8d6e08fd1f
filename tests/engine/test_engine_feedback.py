"""Inputs rounded with feedback: the engine makes of them what calibration made of them."""

import numpy as np
import torch
from engine_models import load, prompt
from tiny_models import build_tiny_model

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import Recipe, quantize
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.whole import WholeModel
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.pipeline import prepare
from fourfold.compress.resolve import open_source, resolve
from fourfold.formats import hadamard

TOKENS = prompt(40)
RULES = [{"weight": "mxfp4", "activation": "mxfp4"}]


def test_logits_are_those_of_the_calibrated_model(tmp_path):
    source = build_tiny_model(tmp_path / "source", initializer_range=0.1)
    passes = ["block-rotation", {"input-feedback": {"group": 64}}, "rtn"]
    recipe = Recipe.model_validate({"name": "test", "rules": RULES, "passes": passes})
    ids = torch.tensor([TOKENS])
    quantize(source, tmp_path / "out", recipe, calibration=CalibrationSet(ids, "random", 0))
    model = prepare(recipe, resolve(open_source(source), recipe).model)
    whole, checkpoint = WholeModel(Skeleton(model, torch.device("cpu"))), open_checkpoint(tmp_path / "out")
    for name, linear in whole.linears.items():
        linear.weight.data.copy_(checkpoint.load(f"{name}.weight").dequantize())
        linear.rotation = hadamard()
    whole.round_inputs()
    with torch.no_grad():
        expected = whole(ids)[0].numpy()
    found = load(tmp_path / "out").logits(TOKENS)
    # a value on the edge between two codes may fall either way
    assert np.median(np.abs(found - expected)) < 1e-4
    for linear in whole.linears.values():
        linear.feedback_group = None
    with torch.no_grad():
        nearest = whole(ids)[0].numpy()
    assert np.abs(found - expected).mean() < 0.05 * np.abs(nearest - expected).mean()
