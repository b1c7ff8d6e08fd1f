"""Packed checkpoints: held packed, computed as transformers computes their dequantized values."""

import numpy as np
import pytest
import torch
from engine_models import continue_all, greedy, load, prompt, witness, witness_logits
from tiny_models import build_tiny_model

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import Recipe, quantize
from fourfold.engine.layers import FusedLinear, Linear
from fourfold.formats import BlockTensor, get_format
from fourfold.kernels import native_available
from fourfold.kernels.cpu.packed import PackedWeight

IN_BLOCKS = PackedWeight if native_available() else BlockTensor
TOKENS = prompt(90)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def packed(request, tmp_path_factory):
    where = tmp_path_factory.mktemp("packed")
    source = build_tiny_model(where / "source", request.param, seed=5)
    quantize(source, where / "mxfp4", "mxfp4")
    return source, where / "mxfp4"


def dequantized_witness(source, packed, activation=None):
    """Transformers' model of ``source`` with ``packed``'s values, inputs rounded to ``activation``."""
    model, checkpoint = witness(source), open_checkpoint(packed)
    for name in checkpoint.names():
        value = checkpoint.load(name)
        if isinstance(value, BlockTensor):
            module = model.get_submodule(name.removesuffix(".weight"))
            module.weight.data = value.dequantize(torch.float32)
            if activation is not None:
                form = get_format(activation)
                module.register_forward_pre_hook(lambda _, args, f=form: (f.fake_quantize(args[0]),))
    return model


def linears(engine):
    for layer in engine.model.layers:
        yield from (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)


def test_logits_are_those_of_the_dequantized_weights(packed):
    source, folder = packed
    expected = witness_logits(dequantized_witness(source, folder), TOKENS)
    np.testing.assert_allclose(load(folder).logits(TOKENS), expected, rtol=1e-4, atol=2e-5)
    assert np.abs(expected - witness_logits(witness(source), TOKENS)).max() > 0.01


def test_weights_stay_packed_and_fused(packed):
    engine = load(packed[1])
    for layer in linears(engine):
        assert isinstance(layer, Linear) and isinstance(layer.weight, IN_BLOCKS)
    qkv = engine.model.layers[0].attention.qkv
    assert isinstance(qkv, Linear) and qkv.weight.shape == (256, 64)


def test_batches_over_packed_weights_are_those_of_one(packed):
    prompts = [prompt(n, seed=n) for n in (4, 30, 11)]
    alone = [continue_all(load(packed[1]), [tokens], greedy(12))[0] for tokens in prompts]
    assert continue_all(load(packed[1], max_batch_tokens=16), prompts, greedy(12)) == alone


def recipe(**changes) -> Recipe:
    rule = {"weight": "mxfp4", "scale_rule": "even"} | changes.pop("rule", {})
    return Recipe.model_validate({"name": "test", "rules": [rule], "passes": ["rtn"]} | changes)


@pytest.mark.parametrize("activation", ["mxfp4", "mxfp6-e2m3", "mxfp8-e4m3"])
def test_emulated_activations(tiny_llama, tmp_path, activation):
    quantize(tiny_llama, tmp_path / "out", recipe(rule={"activation": activation}), "quark")
    expected = witness_logits(dequantized_witness(tiny_llama, tmp_path / "out", activation), TOKENS)
    ours = load(tmp_path / "out").logits(TOKENS)
    plain = witness_logits(dequantized_witness(tiny_llama, tmp_path / "out"), TOKENS)
    # a value on the edge between two codes may fall either way, so a few logits differ by a rounding step
    assert np.median(np.abs(ours - expected)) < 1e-5
    assert np.abs(ours - expected).mean() < 0.1 * np.abs(plain - expected).mean()


def test_parts_of_different_schemes_are_computed_side_by_side(tiny_llama, tmp_path):
    mixed = recipe(keep=["*.v_proj", "*.1.mlp.up_proj"])
    quantize(tiny_llama, tmp_path / "out", mixed)
    engine = load(tmp_path / "out")
    assert isinstance(engine.model.layers[0].attention.qkv, FusedLinear)
    assert isinstance(engine.model.layers[0].mlp.gate_up, Linear)
    expected = witness_logits(dequantized_witness(tiny_llama, tmp_path / "out"), TOKENS)
    np.testing.assert_allclose(engine.logits(TOKENS), expected, rtol=1e-4, atol=2e-5)


def test_a_packed_head(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "out", recipe(keep_default=False))
    engine = load(tmp_path / "out")
    assert isinstance(engine.model.head.weight, IN_BLOCKS)
    expected = witness_logits(dequantized_witness(tiny_llama, tmp_path / "out"), TOKENS)
    np.testing.assert_allclose(engine.logits(TOKENS), expected, rtol=1e-4, atol=2e-5)
