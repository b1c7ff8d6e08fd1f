"""Rotated checkpoints: the engine turns inputs as every other reader that can read them does."""

import json

import numpy as np
import pytest
import torch
from engine_models import load, prompt, witness, witness_logits
from safetensors.torch import load_file
from tiny_models import build_tiny_model

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import Recipe, quantize
from fourfold.compress.calibrated.loop import LayerLoop, key_of
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.pipeline import prepare
from fourfold.compress.resolve import open_source, resolve
from fourfold.core.errors import FourfoldError
from fourfold.engine.layers import FusedLinear, Linear
from fourfold.formats import hadamard
from fourfold.kernels import rotate

TOKENS = prompt(60)
FEW_STEPS = {"steps": 3, "sequences": 2, "micro": 2, "checks": 1, "rotation_lr": 0.05, "holdout": 0}
PASSES = {"hadamard": "block-rotation", "trained": {"kl-rotation": FEW_STEPS}}


def tokens(count: int = 2) -> CalibrationSet:
    return CalibrationSet(torch.tensor([prompt(32, seed=i) for i in range(count)]), "random", 0)


def recipe(how: str, weight: str = "mxfp4", activation: str | None = None, **changes) -> Recipe:
    rule = {"weight": weight, "activation": activation}
    return Recipe.model_validate({"name": "test", "rules": [rule], "passes": [PASSES[how], "rtn"]} | changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("rotation") / "source", initializer_range=0.1)


@pytest.fixture(scope="module", params=["hadamard", "trained"])
def rotated(request, source, tmp_path_factory):
    """A W4A4 checkpoint."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    quantize(source, out, recipe(request.param, activation="mxfp4"), calibration=tokens())
    return out


def logits_with_library_transforms(folder):
    """Logits of transformers and compressed-tensors, which applies its transforms itself."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    model = witness(folder)
    before = set(model.state_dict())
    apply_transform_config(model, TransformConfig(**settings["transform_config"]))
    model.hf_quantizer.compressor.decompress_model(model)
    torch.nn.Module.float(model)
    added = {n: t for n, t in load_file(folder / "model.safetensors").items() if n not in before}
    matrices = {n: t for n, t in added.items() if n.endswith("_input.weight")}
    assert matrices and not model.load_state_dict(matrices, strict=False).unexpected_keys
    return witness_logits(model, TOKENS)


def test_logits_are_those_of_compressed_tensors(source, rotated):
    expected = logits_with_library_transforms(rotated)
    # a value on the edge between two codes may fall either way
    ours = load(rotated).logits(TOKENS)
    assert np.median(np.abs(ours - expected)) < 1e-5
    original = witness_logits(witness(source), TOKENS)
    assert np.abs(ours - expected).mean() < 0.02 * np.abs(ours - original).mean()


def test_wide_formats_change_as_little_as_without_rotation(source, tmp_path):
    quantize(source, tmp_path / "rotated", recipe("hadamard", "mxfp8-e4m3"), calibration=tokens())
    quantize(source, tmp_path / "plain", recipe("hadamard", "mxfp8-e4m3", passes=["rtn"]))
    original = witness_logits(witness(source), TOKENS)
    errors = {n: np.abs(load(tmp_path / n).logits(TOKENS) - original).mean() for n in ("rotated", "plain")}
    assert errors["rotated"] < 1.3 * errors["plain"] < 0.13 * np.abs(original).mean()


def test_one_turn_for_each_input(rotated):
    for layer in load(rotated).model.layers:
        for linear in (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down):
            assert isinstance(linear, Linear) and linear.rotation is not None


def test_parts_that_are_turned_otherwise_are_computed_apart(source, tmp_path):
    some = {"block-rotation": {"modules": ["*.q_proj", "*.k_proj", "*.mlp.*"]}}
    quantize(source, tmp_path / "out", recipe("hadamard", passes=[some, "rtn"]), calibration=tokens())
    engine = load(tmp_path / "out")
    assert isinstance(engine.model.layers[0].attention.qkv, FusedLinear)
    assert engine.model.layers[0].attention.output.rotation is None
    expected = logits_with_library_transforms(tmp_path / "out")
    np.testing.assert_allclose(engine.logits(TOKENS), expected, rtol=1e-4, atol=5e-5)


def test_the_calibration_loop_sees_what_the_engine_computes(source, tmp_path):
    """States after the last layer, of the loop and of the engine; the loop keeps bfloat16 between layers."""
    wanted = recipe("hadamard", activation="mxfp8-e4m3")
    quantize(source, tmp_path / "out", wanted, calibration=tokens())
    model = prepare(wanted, resolve(open_source(source), wanted).model)
    loop = LayerLoop(model, wanted, tokens(), LayerStore(tmp_path), torch.device("cpu"))
    loop.start()
    loop.step(0)
    loop.step(1)
    work = loop.begin(1)
    finished = loop.store.find(key_of(1))
    assert finished is not None
    loop.restore(work, loop.store.load_all(key_of(1), finished))
    ours = load(tmp_path / "out").logits(tokens().token_ids[0].tolist())
    net = witness(source)

    def distance() -> float:
        with torch.no_grad():
            expected = net.lm_head(net.model.norm(work.forward(work.inputs[0])[0])).numpy()
        return np.abs(ours - expected).mean() / np.abs(expected).mean()

    assert distance() < 0.04
    for linear in work.linears.values():
        linear.rotation = None
    assert distance() > 0.4


def test_matrices_stay_float32_in_a_bfloat16_engine(rotated):
    engine = load(rotated, dtype="bfloat16")
    rotation = engine.model.layers[0].mlp.down.rotation
    assert rotation is not None and rotation.dtype == torch.float32
    assert torch.allclose(rotation @ rotation.T, torch.eye(32), atol=1e-5)
    assert engine.logits(TOKENS).shape == (60, 256)
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(rotate(x, hadamard()), rotate(x.float(), hadamard()).bfloat16())


def test_a_length_that_does_not_fit_is_refused():
    with pytest.raises(FourfoldError, match="runs of 32 values"):
        rotate(torch.zeros(2, 48), hadamard())


def test_rotations_are_tensors_but_no_parameters(source, rotated):
    checkpoint = open_checkpoint(rotated)
    matrices = [name for name in checkpoint.names() if name.endswith(".input_rotation")]
    trained = "trained" in {s.input_transform for s in checkpoint.quantization.layers.values()}
    assert len(matrices) == (14 if trained else 0)
    assert checkpoint.card().parameters == open_checkpoint(source).card().parameters
