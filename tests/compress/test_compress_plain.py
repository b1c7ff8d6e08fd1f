"""The plain decoder computes what transformers' modules compute, bit for bit, and stands in where nobody asks
for more than layers.
"""

import subprocess
import sys

import pytest
import torch
from layer_at_work import recipe_of, tokens
from tiny_models import build_tiny_model, tiny_config

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import quantize
from fourfold.compress.calibrated import skeleton as skeletons
from fourfold.compress.calibrated.experts import parameters_apart
from fourfold.compress.calibrated.plain import PlainModel, plain_model
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.kv_calibration import KVObserver
from fourfold.compress.resolve import resolve

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}
OTHERS = {
    "another activation": ("llama", {"hidden_act": "gelu"}),
    "a window": ("mistral", {"sliding_window": 8}),
    "windows in some layers": ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}),
    "windows by a switch": ("qwen2", {"use_sliding_window": True}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
    "an old spelling of yarn": ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
    "frequencies for each kind of layer": (
        "qwen3",
        {
            "rope_parameters": {"full_attention": {"rope_theta": 1e4}},
            "rope_theta": None,
        },
    ),
    "part of a head": ("llama", {"partial_rotary_factor": 0.5}),
    "a default that is not written": ("qwen3", {"head_dim": None}),
    "experts": ("mixtral", {"num_local_experts": 4}),
}


@torch.no_grad()
def states(skeleton):
    """Hidden states before and after every layer, and the largest keys and values."""
    inputs, calls = skeleton.enter([tokens(3, 40).token_ids, tokens(1, 40, seed=1).token_ids])
    cache, found = KVObserver(), list(inputs)
    for index in range(len(skeleton)):
        layer = skeleton.materialise(index)
        for x in inputs:
            call = calls[len(x)][index]
            out = layer(x, *call.args, **(call.kwargs | {"past_key_values": cache}))
            found.append(out[0] if isinstance(out, tuple) else out)
        inputs = found[-len(inputs) :]
    return found, cache.amax


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_transformers_does(tmp_path, name):
    model_type, changes = MODELS[name]
    folder = build_tiny_model(tmp_path / "model", model_type, initializer_range=0.3, **changes)
    model = resolve(open_checkpoint(folder), recipe_of("gptq")).model
    plain, whole = (Skeleton(model, torch.device("cpu"), layers_only=lean) for lean in (True, False))
    assert isinstance(plain.net, PlainModel) and not isinstance(whole.net, PlainModel)
    assert parameters_apart(plain.net) == parameters_apart(whole.net)
    (found, amax), (expected, expected_amax) = states(plain), states(whole)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert amax.keys() == expected_amax.keys()
    assert all(torch.equal(amax[index], expected_amax[index]) for index in amax)


@pytest.mark.parametrize("name", OTHERS)
def test_it_leaves_to_transformers(name):
    model_type, changes = OTHERS[name]
    assert plain_model(tiny_config(model_type, **changes)) is None


@pytest.mark.parametrize("passes", [("gptq",), ("autosmoothquant", "gptq")])
def test_checkpoints_are_the_same_bytes(tiny_llama, tmp_path, monkeypatch, passes):
    recipe = recipe_of(*passes, activation="mxfp4")
    quantize(tiny_llama, tmp_path / "plain", recipe, calibration=tokens())
    monkeypatch.setattr(skeletons, "plain_model", lambda config: None)
    quantize(tiny_llama, tmp_path / "whole", recipe, calibration=tokens())
    plain, whole = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "whole"))
    assert plain == whole


SCRIPT = """
import sys, torch
before = set(sys.modules)
from fourfold.compress import Recipe, quantize
from fourfold.compress.calibration import CalibrationSet
recipe = Recipe.model_validate({"name": "x", "rules": [{"weight": "mxfp4"}], "passes": ["gptq"]})
tokens = torch.arange(64).view(2, 32)
quantize(sys.argv[1], sys.argv[2], recipe, calibration=CalibrationSet(tokens, "x", 0))
print(*sorted({"transformers", "torch._dynamo", "sympy", "scipy"} & (sys.modules.keys() - before)))
"""


def test_nothing_heavy_is_imported(tiny_llama, tmp_path):
    command = [sys.executable, "-c", SCRIPT, tiny_llama, tmp_path / "out"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == ""
