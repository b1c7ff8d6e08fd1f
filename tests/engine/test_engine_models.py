"""Every architecture of the registry against transformers: logits whole, in chunks, beside others, packed."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from engine_models import (
    CASES,
    LLAMA3,
    build_case,
    greedy,
    load,
    prompt,
    values_witness,
    witness,
    witness_logits,
)
from kv_checkpoints import with_kv_cache
from safetensors.torch import load_file, save_file
from tiny_models import build_architecture

from fourfold.compress import quantize
from fourfold.core.errors import FourfoldError
from fourfold.engine import Completion, Request
from fourfold.engine.experts import MixtureOfExperts
from fourfold.engine.layers import Linear
from fourfold.engine.loading import ARCHITECTURES
from fourfold.engine.rotary import Rotary
from fourfold.formats import BlockTensor, get_format
from fourfold.kernels import native_available
from fourfold.kernels.cpu.packed import PackedWeight

IN_BLOCKS = PackedWeight if native_available() else BlockTensor

ALL = [(model, case) for model, cases in CASES.items() for case in cases]
FIRST = [(model, next(iter(cases))) for model, cases in CASES.items()]
EXPERTS = ["qwen3_moe", "mixtral", "gpt_oss"]
PACKED = [(*case, "compressed-tensors") for case in [*FIRST, ("qwen3_moe", "fused"), ("mixtral", "fused")]]
PACKED += [(*case, "quark") for case in FIRST if case[0] in EXPERTS]


def test_every_architecture_is_here():
    assert sorted(CASES) == sorted(name.replace("-", "_") for name in ARCHITECTURES.names())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Case -> (folder, transformers' model), each made once."""
    folder, made = tmp_path_factory.mktemp("architectures"), {}

    def build(model, case):
        if (model, case) not in made:
            where = build_case(folder / f"{model}-{case}", model, case)
            made[model, case] = where, witness(where)
        return made[model, case]

    return build


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_logits_are_those_of_transformers(built, case):
    folder, reference = built(*case)
    tokens = prompt(150)
    ours, theirs = load(folder).logits(tokens), witness_logits(reference, tokens)
    assert ours.dtype == np.float32
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_chunks_and_batches_continue_as_transformers_does(built, case):
    """Prompts of several chunks beside short ones; blocks of 8, so that windows begin inside of them."""
    folder, reference = built(*case)
    prompts = [prompt(n, seed=n) for n in (5, 70, 41)]
    engine = load(folder, max_batch_tokens=16, kv_block_size=8)
    for done in engine.generate(prompts, greedy(24, logprobs=1)):
        follows_transformers(done, reference)
    again = engine.generate([prompts[1] + prompt(9)], greedy(4, logprobs=1))[0]
    assert engine.stats.prefix_hit_tokens == 64
    follows_transformers(again, reference)


def follows_transformers(done, reference):
    """Each token is transformers' likeliest after those before it, with its logprob."""
    theirs = witness_logits(reference, done.prompt_token_ids + done.token_ids)
    theirs = theirs[len(done.prompt_token_ids) - 1 : -1]
    of_ours = theirs[np.arange(len(theirs)), done.token_ids]
    assert (of_ours > theirs.max(1) - 1e-4).all()
    expected = of_ours - np.log(np.exp(theirs.astype(np.float64)).sum(1))
    np.testing.assert_allclose(done.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize("case", PACKED, ids="-".join)
def test_packed_models_are_those_of_their_values(built, tmp_path, case):
    *case, dialect = case
    model = case[0]
    source, reference = built(*case)
    quantize(source, tmp_path / "mxfp4", "mxfp4", dialect)
    engine, tokens = load(tmp_path / "mxfp4"), prompt(60)
    ours = engine.logits(tokens)
    expected = values_witness(source, tmp_path / "mxfp4", tmp_path / "values")
    np.testing.assert_allclose(ours, witness_logits(expected, tokens), rtol=1e-4, atol=2e-5)
    assert np.abs(ours - witness_logits(reference, tokens)).max() > 0.01
    mlps = [layer.mlp for layer in engine.model.layers]
    mlps = [e for mlp in mlps for e in (mlp.experts if isinstance(mlp, MixtureOfExperts) else [mlp])]
    assert len(mlps) == (8 if model in EXPERTS else 2)
    for mlp in mlps:
        for linear in (mlp.gate_up, mlp.down):
            assert isinstance(linear, Linear)
            assert isinstance(linear.weight, IN_BLOCKS)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A gpt-oss as OpenAI stores it: experts [E, N, K] in fused MXFP4 blocks, everything else in bf16."""
    folder = build_architecture(
        tmp_path_factory.mktemp("released") / "gpt-oss", "gpt_oss", attention_bias=True
    )
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        held = get_format("mxfp4").quantize(tensors.pop(name).mT.float())
        tensors[name + "_blocks"] = held.blocks.unflatten(-1, (-1, 16)).contiguous()
        tensors[name + "_scales"] = held.scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_gpt_oss_as_released_is_read_as_transformers_reads_it(released):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    settings = Mxfp4Config(dequantize=True)
    expanded = AutoModelForCausalLM.from_pretrained(
        released, quantization_config=settings, dtype=torch.bfloat16
    )
    reference, tokens = expanded.float(), prompt(90)
    engine = load(released, max_batch_tokens=16)
    np.testing.assert_allclose(engine.logits(tokens), witness_logits(reference, tokens), rtol=1e-4, atol=2e-5)
    for done in engine.generate([tokens, prompt(7)], greedy(12, logprobs=1)):
        follows_transformers(done, reference)
    expert = engine.model.layers[0].mlp.experts[3]
    assert isinstance(expert.gate_up.weight, IN_BLOCKS) and expert.gate_up.weight.shape == (128, 64)
    assert isinstance(expert.down.weight, IN_BLOCKS)


def test_only_chosen_experts_are_computed(built):
    folder, _ = built("qwen3_moe", "plain")
    engine, tokens = load(folder), prompt(1)
    expected = engine.logits(tokens)
    for layer in engine.model.layers:
        seen = {}
        for number, expert in enumerate(layer.mlp.experts):
            layer.mlp.experts[number] = lambda x, n=number, e=expert, s=seen: (s.update({n: len(x)}), e(x))[1]
        engine.logits(tokens)
        assert sorted(seen.values()) == [1, 1]
    np.testing.assert_array_equal(engine.logits(tokens), expected)


@pytest.mark.parametrize("model", ["llama", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_bfloat16_stays_near_transformers(built, model):
    folder, exact = built(model, next(iter(CASES[model])))
    tokens = prompt(100)
    ours = load(folder, dtype="auto").logits(tokens)
    theirs = witness_logits(witness(folder, torch.bfloat16), tokens)
    exact = witness_logits(exact, tokens)
    assert np.abs(ours - exact).mean() < 1.2 * np.abs(theirs - exact).mean()


def test_blocks_before_the_window_are_not_read(built):
    """Neither by a decode nor by a chunk of a prompt: what is not a number there spoils nothing."""
    folder, reference = built("mistral", "window")
    engine = load(folder, max_batch_tokens=16, kv_block_size=8)
    engine.add(Request("x", prompt(90), greedy(8, logprobs=1)))
    done = Completion(prompt(90), [], "", "length")
    while engine.has_work:
        for sequence in engine.scheduler.running:
            unseen = max(0, sequence.computed - 20 + 1) // 8
            engine.cache.data[:, list(sequence.table.blocks[:unseen])] = torch.nan
        for output in engine.step():
            done.extend(output)
    assert unseen >= 9
    follows_transformers(done, reference)


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
@pytest.mark.parametrize("model", ["gpt_oss", "gemma3_text"])
def test_other_caches_lose_the_same_in_blocks_and_at_once(built, model, form):
    folder, _ = built(model, next(iter(CASES[model])))
    engine, tokens = load(folder, kv_cache=form, max_batch_tokens=16, kv_block_size=8), prompt(60)
    for done in engine.generate([tokens, prompt(11)], greedy(12, logprobs=1)):
        logits = engine.logits(done.prompt_token_ids + done.token_ids)[len(done.prompt_token_ids) - 1 : -1]
        expected = torch.from_numpy(logits).log_softmax(-1)[torch.arange(12), done.token_ids]
        np.testing.assert_allclose(done.logprobs, expected, atol=1e-4)


def test_scales_of_the_cache_are_found_beside_a_vision_tower(built, tmp_path):
    names = [f"language_model.model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "kv"]
    scales = {name: torch.tensor([0.01, 0.02]) * (at + 1) for at, name in enumerate(names)}
    folder = with_kv_cache(built("gemma3", "plain")[0], tmp_path / "kv", "fp8-head", scales)
    held = load(folder).cache.form.scales
    assert torch.equal(held.flatten(), torch.cat(list(scales.values())))


def test_old_and_new_rope_keys_mean_the_same():
    old = {"rope_theta": 10000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    new = {"rope_parameters": LLAMA3}
    at = torch.arange(128)
    cosines = [Rotary(c, 32, torch.float32).at(at)[0] for c in (old, new, {"rope_theta": 10000.0})]
    assert torch.equal(cosines[0], cosines[1])
    assert not torch.equal(cosines[0], cosines[2])


def test_yarn_lengthens_as_the_paper_says():
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    assert math.isclose(Rotary({"rope_scaling": rope}, 64, torch.float32).length, 1.3465735902799727)
    given = rope | {"attention_factor": 1.25}
    assert Rotary({"rope_scaling": given}, 64, torch.float32).length == 1.25


def test_logits_in_slices_of_the_head_are_whole(tiny_llama):
    """More tokens than one slice of the head, so a seam falls inside."""
    engine, tokens = load(tiny_llama), prompt(300)
    np.testing.assert_allclose(engine.logits(tokens)[:290], engine.logits(tokens[:290]), atol=1e-5)


@pytest.mark.parametrize("case", [("gpt_oss", "plain"), ("gemma3_text", "two-ropes")], ids="-".join)
def test_scores_in_slices_of_the_queries_are_whole(built, monkeypatch, case):
    """As with a context so long that the scores of all queries are not held at once."""
    folder, _ = built(*case)
    expected = load(folder).logits(prompt(150))
    monkeypatch.setattr("fourfold.engine.attention.SLICE_SCORES", 4 * 150 * 7)
    np.testing.assert_allclose(load(folder).logits(prompt(150)), expected, atol=1e-5)
    tokens = load(folder).generate([prompt(40)], greedy(8))[0].token_ids
    monkeypatch.undo()
    assert load(folder).generate([prompt(40)], greedy(8))[0].token_ids == tokens


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 9}, "9 of 4 experts"),
        ("mixtral", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("mixtral", {"sliding_window": "far"}, "window of 'far'"),
        ("gpt_oss", {"layer_types": ["sliding_attention"]}, "layer 1.*'None'"),
        ("gpt_oss", {"layer_types": ["linear_attention"] * 2}, "layer 0.*'linear_attention'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"hidden_activation": "relu"}, "'relu'"),
        ("gemma3_text", {"query_pre_attn_scalar": "x"}, "unusable size"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(built, tmp_path, model, changes, message):
    folder = shutil.copytree(built(model, next(iter(CASES[model])))[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(FourfoldError, match=message):
        load(folder)


def test_a_missing_expert_is_named(built, tmp_path):
    folder = shutil.copytree(built("qwen3_moe", "plain")[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FourfoldError, match=r"layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        load(folder)
