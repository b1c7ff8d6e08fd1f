"""Recipes with a KV cache of FP8 through the calibrated run: scales of the finished model, resumed alike."""

import pytest
import torch
from tiny_models import build_tiny_model

from fourfold.checkpoint import open_checkpoint
from fourfold.checkpoint.verify import verify
from fourfold.compress import Recipe, quantize
from fourfold.compress.calibrated.loop import LayerLoop
from fourfold.compress.calibration import CalibrationSet
from fourfold.core.errors import UsageError
from fourfold.engine import Engine, EngineConfig

TOKENS = CalibrationSet(
    torch.randint(2, 250, (4, 24), generator=torch.Generator().manual_seed(0)), "random", 0
)


def recipe(kv_cache: str, **changes) -> Recipe:
    plain = {"name": "kv", "rules": [{"weight": "mxfp4"}], "passes": ["gptq"], "kv_cache": kv_cache}
    return Recipe.model_validate(plain | changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("source") / "model", "qwen3", seed=4)


def largest(folder) -> dict[str, torch.Tensor]:
    """What transformers' own cache holds at most, of the dequantized model on the calibration tokens."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "witness", dtype=torch.float32).eval()
    for name in checkpoint.names():
        value = checkpoint.load(name)
        value = value if isinstance(value, torch.Tensor) else value.dequantize()
        model.get_parameter(name).data.copy_(value)
    with torch.no_grad():
        layers = model(TOKENS.token_ids, use_cache=True).past_key_values.layers
    return {
        f"model.layers.{i}.self_attn.{part}_proj": states.abs().amax((0, 2, 3))
        for i, layer in enumerate(layers)
        for part, states in (("k", layer.keys), ("v", layer.values))
    }


@pytest.mark.parametrize("changes", [{}, {"passes": ["rtn"]}, {"rules": [], "passes": []}])
@pytest.mark.parametrize("kind", ["fp8", "fp8-head"])
def test_the_scales_are_those_of_the_finished_model(source, tmp_path, kind, changes):
    (tmp_path / "witness").symlink_to(source)
    asked = recipe(kind, **changes)
    quantize(source, tmp_path / "out", asked, calibration=TOKENS)
    found = open_checkpoint(tmp_path / "out").kv_scales
    for module, amax in largest(tmp_path / "out").items():
        expected = amax if kind == "fp8-head" else amax.max().reshape(1)
        torch.testing.assert_close(found[module] * 448, expected, rtol=0.01, atol=0)
    assert verify(tmp_path / "out").passed
    engine = Engine.load(tmp_path / "out", EngineConfig(threads=1))
    assert engine.card.kv_cache_format == kind


def test_a_run_that_was_ended_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    whole = quantize(source, tmp_path / "whole", recipe("fp8-head"), calibration=TOKENS)
    step = LayerLoop.step

    def die_after_the_first(self, index):
        if index == 1:
            raise KeyboardInterrupt
        return step(self, index)

    monkeypatch.setattr(LayerLoop, "step", die_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", recipe("fp8-head"), calibration=TOKENS)
    monkeypatch.undo()
    resumed = quantize(source, tmp_path / "out", recipe("fp8-head"), calibration=TOKENS, resume=True)
    assert resumed.sha256["model.safetensors"] == whole.sha256["model.safetensors"]


def test_scales_that_nothing_calibrated_are_ones_and_the_card_says_so(source, tmp_path):
    manifest = quantize(source, tmp_path / "out", recipe("fp8", passes=["rtn"]))
    assert all(scale == 1 for scale in open_checkpoint(tmp_path / "out").kv_scales.values())
    (note,) = manifest.card.notes
    assert "beyond 448" in note and manifest.calibration is None


def test_scales_of_heads_need_a_calibration_set(source, tmp_path):
    with pytest.raises(UsageError, match=r"looks at activations \(rtn, kv_cache\).*--calibration"):
        quantize(source, tmp_path / "out", recipe("fp8-head", passes=["rtn"]))
    assert not list(tmp_path.iterdir())
