"""Calibration's layers, one after the other, compute what transformers' whole model computes."""

import pytest
import torch
from tiny_models import ARCHITECTURES, build_architecture

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import load_recipe
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.resolve import resolve

TOKENS = torch.randint(2, 250, (3, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each model is built when it is first asked for."""
    folder, built = tmp_path_factory.mktemp("architectures"), {}

    def get(model_type):
        if model_type not in built:
            built[model_type] = build_architecture(folder / model_type, model_type)
        return built[model_type]

    return get


def skeleton_of(folder, recipe="mxfp4"):
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return Skeleton(resolve(open_checkpoint(folder), recipe).model, torch.device("cpu"))


@torch.no_grad()
def through_layers(skeleton, batches):
    """Hidden states before the first and after each layer, of every batch."""
    inputs, calls = skeleton.enter(batches)
    states = [inputs]
    for index in range(len(skeleton)):
        layer = skeleton.materialise(index)
        inputs = [
            out[0] if isinstance(out := layer(x, *call.args, **call.kwargs), tuple) else out
            for x in inputs
            for call in [calls[len(x)][index]]
        ]
        states.append(inputs)
    return states


@torch.no_grad()
def through_transformers(folder, batches):
    """The same, from hooks on transformers' own layers."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states = [[] for _ in range(len(net.model.layers) + 1)]
    net.model.layers[0].register_forward_pre_hook(lambda m, args: states[0].append(args[0]))
    for index, layer in enumerate(net.model.layers):
        layer.register_forward_hook(lambda m, args, out, index=index: states[index + 1].append(out))
    for batch in batches:
        net(input_ids=batch, use_cache=False)
    return states


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_layers_in_turn_compute_what_transformers_does(models, model_type):
    batches = [TOKENS[:2], TOKENS[2:]]
    ours = through_layers(skeleton_of(models(model_type)), batches)
    theirs = through_transformers(models(model_type), batches)
    for mine, other in zip(ours, theirs, strict=True):
        for x, y in zip(mine, other, strict=True):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_rounded_is_exactly_what_calibration_sees(models, model_type):
    skeleton = skeleton_of(models(model_type))
    rounded = set(skeleton.model.quantization.layers)
    linears: set[str] = set()
    for index in range(len(skeleton)):
        found = skeleton.logical_linears(index, skeleton.materialise(index))
        assert all(name.startswith(skeleton.prefix(index) + ".") for name in found)
        linears |= found.keys()
    assert rounded <= linears
    kept = {name for name in linears - rounded}
    assert all(name.endswith(("gate", "router", "shared_expert_gate")) for name in kept), kept
