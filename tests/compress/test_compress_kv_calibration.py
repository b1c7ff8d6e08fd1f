"""Calibrated KV scales: what reaches transformers' cache, head by head, and what the engine makes of it."""

import numpy as np
import pytest
import torch
from kv_checkpoints import with_kv_cache
from tiny_models import build_tiny_model

from fourfold.checkpoint import open_checkpoint
from fourfold.checkpoint.kv_scales import cached_projections
from fourfold.compress.kv_calibration import KVObserver, scales
from fourfold.core.errors import FourfoldError
from fourfold.engine import Engine, EngineConfig

HYBRID = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(2, 256, (3, 40)))


def observed(folder, tokens=TOKENS):
    """An observer that stood in the layers of transformers' model, and what transformers' own cache held."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(tokens, use_cache=True)
    observer = KVObserver()

    def take_observer(_, args, kwargs):
        return args, kwargs | {"past_key_values": observer}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(take_observer, with_kwargs=True)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, plain.logits, rtol=1e-5, atol=1e-5)  # looking changes nothing
    return observer, plain.past_key_values


def modules_of(folder):
    checkpoint = open_checkpoint(folder)
    return cached_projections(checkpoint.info(name) for name in checkpoint.names())


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_next"])
def seen(request, tmp_path_factory):
    """A tiny model with two key heads for four query heads; Qwen3 norms them, Qwen3-Next has few."""
    changes = HYBRID if request.param == "qwen3_next" else {}
    folder = build_tiny_model(tmp_path_factory.mktemp("kv") / "model", request.param, seed=3, **changes)
    return folder, *observed(folder)


def test_the_largest_of_each_key_head_is_kept(seen):
    _, observer, cache = seen
    assert observer.amax
    for index, amax in observer.amax.items():
        layer = cache.layers[index]
        expected = torch.stack([states.abs().amax((0, 2, 3)) for states in (layer.keys, layer.values)])
        assert amax.shape == (2, 2)  # grouped heads are not repeated before the cache
        torch.testing.assert_close(amax, expected, rtol=1e-5, atol=1e-6)


def test_only_layers_with_a_cache_have_scales(seen):
    folder, observer, _ = seen
    modules = modules_of(folder)
    found = scales(observer, "fp8-head", modules)
    assert set(found) == set(modules) and len(modules) == 2 * len(observer.amax)
    for module, scale in found.items():
        index = int(module.split(".")[2])
        torch.testing.assert_close(scale, observer.amax[index][int(module.endswith("v_proj"))] / 448)
        (one,) = scales(observer, "fp8", [module]).values()
        assert one.shape == (1,) and one == scale.max()
    assert scales(observer, "mxfp4", modules) == {}


def test_batches_add_up_and_an_interrupted_run_goes_on(tmp_path):
    folder = build_tiny_model(tmp_path / "model", seed=3)
    whole, _ = observed(folder)
    first, _ = observed(folder, TOKENS[:1])
    second, _ = observed(folder, TOKENS[1:])
    resumed = KVObserver({index: amax.clone() for index, amax in first.amax.items()})
    for index, amax in second.amax.items():
        resumed.update(amax[0].view(1, 2, 1, 1), amax[1].view(1, 2, 1, 1), index)
    for index, amax in whole.amax.items():
        torch.testing.assert_close(resumed.amax[index], amax, rtol=1e-5, atol=1e-6)


def test_a_silent_head_and_a_broken_one():
    observer = KVObserver({0: torch.tensor([[0.0, 448.0], [4.48, torch.nan]])})
    key, value = (f"model.layers.0.self_attn.{letter}_proj" for letter in "kv")
    assert scales(observer, "fp8-head", [key])[key].tolist() == [1.0, 1.0]
    with pytest.raises(FourfoldError, match=r"0\.self_attn\.v_proj .*not finite"):
        scales(observer, "fp8", [value])
    assert scales(observer, "fp8", ["model.layers.7.self_attn.k_proj"]) == {}


def quieten_heads(folder):
    """Make the first key head of every layer far quieter than the other."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            tensor[:32] *= 2.0**-18
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_scales(source, out, kind, observer):
    """``source`` with a KV cache of ``kind``, calibrated by ``observer``, in the engine."""
    checkpoint = open_checkpoint(source)
    projections = cached_projections([checkpoint.info(name) for name in checkpoint.names()])
    with_kv_cache(source, out, kind, scales(observer, kind, projections))
    return Engine.load(out, EngineConfig(dtype="float32", threads=1))


def test_scales_of_heads_hold_what_one_scale_loses(tmp_path):
    """From calibration through the checkpoint to the engine: keys and values that the cache really gets."""
    source = build_tiny_model(tmp_path / "source", seed=3)
    quieten_heads(source)
    observer, cache = observed(source)
    kv = torch.cat([cache.layers[1].keys[0], cache.layers[1].values[0]]).transpose(0, 1)  # [T, 2 * heads, D]
    errors = {}
    for kind in ("fp8", "fp8-head"):
        form = with_scales(source, tmp_path / kind, kind, observer).cache.form
        kept = form.decode(1, form.encode(1, kv))
        errors[kind] = ((kept - kv).abs().amax((0, 2)) / kv.abs().amax((0, 2))).tolist()
    assert max(errors["fp8-head"]) <= 2.0**-4  # half a step of three mantissa bits
    assert errors["fp8"][1] <= 2.0**-4 and errors["fp8"][3] <= 2.0**-4
    assert errors["fp8"][0] > 0.5 and errors["fp8"][2] > 0.5
