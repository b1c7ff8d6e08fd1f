"""Rounded and rotated inputs as operations of the program: near the torch path, which rounds by formats."""

import numpy as np
import pytest
import torch
from engine_models import CASES, build_case, continue_all, greedy, load, prompt
from tiny_models import build_tiny_model

from fourfold.compress import Recipe, quantize
from fourfold.compress.calibration import CalibrationSet
from fourfold.engine.layers import FusedLinear
from fourfold.kernels import native_available

pytestmark = pytest.mark.skipif(not native_available(), reason="the C++ extension is not built")

TOKENS = prompt(120)
FEW_STEPS = {"steps": 3, "sequences": 2, "micro": 2, "checks": 1, "rotation_lr": 0.05, "holdout": 0}
PASSES = {"plain": [], "hadamard": ["block-rotation"], "trained": [{"kl-rotation": FEW_STEPS}]}


def recipe(how: str, activation: str | None, **changes) -> Recipe:
    rule = {"weight": "mxfp4", "activation": activation}
    return Recipe.model_validate({"name": "test", "rules": [rule], "passes": [*PASSES[how], "rtn"]} | changes)


def calibration() -> CalibrationSet:
    return CalibrationSet(torch.tensor([prompt(32, seed=i) for i in range(2)]), "random", 0)


def made(source, out, how, activation, **changes):
    dialect = "quark" if how == "plain" else "compressed-tensors"
    given = {} if how == "plain" else {"calibration": calibration()}
    quantize(source, out, recipe(how, activation, **changes), dialect, **given)
    return out


def error(ours, theirs) -> float:
    """Root mean square difference of a position's logits over how much they vary: the median one."""
    return float(np.median(np.sqrt(np.mean((ours - theirs) ** 2, -1)) / theirs.std()))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("schemes") / "source", initializer_range=0.1)


def native(folder, **config):
    engine = load(folder, **({"dtype": "bfloat16"} | config))
    assert not engine.arithmetic.startswith("torch"), engine.arithmetic
    return engine


FORMS = [(how, form) for how in PASSES for form in ("mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", None)]
FORMS += [("plain", "mxfp6-e3m2"), ("plain", "mxfp8-e5m2")]


@pytest.mark.parametrize(("how", "activation"), FORMS)
def test_exact_is_no_farther_from_float32_than_torch_in_bfloat16(
    source, tmp_path, monkeypatch, how, activation
):
    """Values at the edge between two codes fall either way, and what follows them differs by a step."""
    folder = made(source, tmp_path / "out", how, activation)
    exact = load(folder)
    assert exact.arithmetic.startswith("torch")
    ours = native(folder, arithmetic="exact")
    monkeypatch.setattr("fourfold.engine.obstacles.native_available", lambda: False)
    torchs = load(folder, dtype="bfloat16").logits(TOKENS)
    monkeypatch.undo()
    expected = exact.logits(TOKENS)
    assert error(ours.logits(TOKENS), expected) < 0.9 * error(torchs, expected)
    states = exact.embedded(TOKENS)
    assert error(ours.through(states, 0, 1), exact.through(states, 0, 1)) < 0.1


@pytest.mark.parametrize("activation", ["mxfp4", "mxfp6-e2m3"])
@pytest.mark.parametrize("how", ["plain", "hadamard"])
def test_nothing_moves_what_4_and_6_bits_hold_unless_int8_is_asked_for(source, tmp_path, how, activation):
    folder = made(source, tmp_path / "out", how, activation)
    exact = native(folder, arithmetic="exact").logits(TOKENS)
    engine = native(folder)
    assert np.array_equal(engine.logits(TOKENS), exact)
    moved = native(folder, arithmetic="int8").logits(TOKENS)
    assert error(moved, exact) < 0.3
    answer = continue_all(engine, [TOKENS[:40]], greedy(6))[0]
    assert answer == engine.logits(TOKENS[:40] + answer)[39:-1].argmax(-1).tolist()


@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_see_rounded_inputs_and_their_router_does_not(tmp_path, model):
    source = build_case(tmp_path / "source", model, next(iter(CASES[model])))
    folder = made(source, tmp_path / "out", "plain", "mxfp4")
    exact, ours = load(folder), native(folder)
    assert any(expert.down.activation == "mxfp4" for expert in exact.model.layers[0].mlp.experts)
    states = exact.embedded(TOKENS)
    expected = exact.through(states, 0, 1)
    assert error(ours.through(states, 0, 1), expected) < 0.1
    quantize(source, tmp_path / "plain", recipe("plain", None), "quark")
    assert error(native(tmp_path / "plain").through(states, 0, 1), expected) > 0.15


def test_parts_that_are_turned_otherwise_are_prepared_apart(source, tmp_path):
    some = {"block-rotation": {"modules": ["*.q_proj", "*.k_proj", "*.mlp.*"]}}
    folder = made(source, tmp_path / "out", "hadamard", "mxfp6-e2m3", passes=[some, "rtn"])
    exact, ours = load(folder), native(folder)
    assert isinstance(exact.model.layers[0].attention.qkv, FusedLinear)
    states = exact.embedded(TOKENS)
    assert error(ours.through(states, 0, 1), exact.through(states, 0, 1)) < 0.1
