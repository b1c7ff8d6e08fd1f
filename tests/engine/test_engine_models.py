"""Every architecture of the registry against transformers: logits and greedy tokens."""

import numpy as np
import pytest
import torch
from engine_models import continue_all, greedy, load, prompt, witness, witness_logits
from tiny_models import build_tiny_model

from fourfold.engine.loading import ARCHITECTURES
from fourfold.engine.rotary import Rotary

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one-key-head": {"num_key_value_heads": 1},
    "every-head-its-key": {"num_key_value_heads": 4},
    "rope-llama3": {"rope_parameters": LLAMA3},
    "rope-linear": {"rope_parameters": LINEAR},
}
CASES = [(model, variant) for model in ARCHITECTURES.names() for variant in VARIANTS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def folder(request, tmp_path_factory):
    model, variant = request.param
    where = tmp_path_factory.mktemp("architectures") / f"{model}-{variant}"
    return build_tiny_model(where, model.replace("-", "_"), seed=3, **VARIANTS[variant])


@pytest.fixture(scope="module")
def reference(folder):
    model = witness(folder)
    for name, tensor in model.named_parameters():  # transformers starts biases at zero and norms at one
        if name.endswith("bias") or "norm" in name:
            torch.manual_seed(len(name))
            tensor.data += torch.rand_like(tensor)
    model.to(torch.bfloat16).save_pretrained(folder)
    return witness(folder)  # read again: the cast has rounded its rotary frequencies too


def test_logits_are_those_of_transformers(folder, reference):
    tokens = prompt(150)
    ours, theirs = load(folder).logits(tokens), witness_logits(reference, tokens)
    assert ours.dtype == np.float32
    assert theirs.std() > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_greedy_tokens_are_those_of_transformers(folder, reference):
    prompts = [prompt(n, seed=n) for n in (5, 40)]
    ours = continue_all(load(folder), prompts, greedy(24))
    for tokens, answer in zip(prompts, ours, strict=True):
        with torch.no_grad():
            theirs = reference.generate(
                torch.tensor([tokens]), do_sample=False, min_new_tokens=24, max_new_tokens=24
            )
        assert answer == theirs[0, len(tokens) :].tolist()


def test_bfloat16_stays_near_transformers(tiny_llama):
    tokens = prompt(100)
    ours = load(tiny_llama, dtype="auto").logits(tokens)
    theirs = witness_logits(witness(tiny_llama, torch.bfloat16), tokens)
    exact = witness_logits(witness(tiny_llama), tokens)
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


def test_old_and_new_rope_keys_mean_the_same():
    old = {"rope_theta": 10000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    new = {"rope_parameters": LLAMA3}
    at = torch.arange(128)
    cosines = [Rotary(c, 32, torch.float32).at(at)[0] for c in (old, new, {"rope_theta": 10000.0})]
    assert torch.equal(cosines[0], cosines[1])
    assert not torch.equal(cosines[0], cosines[2])


def test_logits_in_slices_of_the_head_are_whole(tiny_llama):
    """More tokens than one slice of the head, so a seam falls inside."""
    engine, tokens = load(tiny_llama), prompt(300)
    np.testing.assert_allclose(engine.logits(tokens)[:290], engine.logits(tokens[:290]), atol=1e-5)
