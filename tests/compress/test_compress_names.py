"""Which names and shapes count as linear weights, for many architectures' ways of naming."""

import pytest

from fourfold.compress import Recipe, load_recipe
from fourfold.compress.names import check_orientation, kept_reason, looks_stacked, not_linear
from fourfold.core.errors import FourfoldError

SHAPE = (64, 64)


def fate(name: str, shape=SHAPE, recipe: Recipe | None = None) -> str | None:
    return not_linear(name, shape) or kept_reason(name, recipe or load_recipe("mxfp4"))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.11.mlp.gate_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.mixer.in_proj.weight",
        "transformer.h.0.attn.attention.q_proj.weight",
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight",
        "model.language_model.layers.0.self_attn.o_proj.weight",
    ],
)
def test_linear_weights_of_decoder_layers_are_rounded(name):
    assert fate(name) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("transformer.word_embeddings.weight", "embedding"),
        ("model.layers.0.embed_tokens_per_layer.weight", "embedding"),
        ("lm_head.weight", "outside the decoder layers"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.mlp.router.weight", "router"),
        ("model.layers.0.block_sparse_moe.router.layer.weight", "router"),
        ("model.layers.0.mlp.gate.wg.weight", "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "router"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision or audio tower"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "vision or audio tower"),
        ("audio_tower.layers.0.fc1.weight", "vision or audio tower"),
        ("model.multi_modal_projector.linear_1.weight", "outside the decoder layers"),
        ("model.layers.0.self_attn.q_proj.bias", "not a weight"),
        ("model.layers.0.mixer.A_log", "not a weight"),
    ],
)
def test_the_rest_is_kept_with_its_reason(name, reason):
    assert fate(name) == reason


def test_rank_decides_before_names():
    assert fate("model.layers.0.input_layernorm.weight", (64,)) == "1-D"
    assert fate("model.layers.0.mixer.conv1d.weight", (64, 1, 4)) == "convolution"


def test_keep_comes_before_rules_and_defaults_can_be_lifted():
    recipe = Recipe(name="x", rules=load_recipe("mxfp4").rules, keep=["*.layers.0.*"], passes=["rtn"])
    assert fate("model.layers.0.mlp.up_proj.weight", recipe=recipe) == "keep: *.layers.0.*"
    assert fate("model.layers.1.mlp.up_proj.weight", recipe=recipe) is None
    lifted = recipe.model_copy(update={"keep_default": False})
    assert fate("lm_head.weight", recipe=lifted) is None
    assert fate("model.embed_tokens.weight", recipe=lifted) == "embedding"


def test_what_may_be_stacked_linears_is_noticed():
    assert looks_stacked("model.layers.0.mlp.experts.w13_weight", (4, 128, 64))
    assert looks_stacked("transformer.blocks.0.ffn.experts.mlp.w1", (256, 64))
    assert looks_stacked("model.layers.0.mlp.input_linear.weight", (4, 128, 64))
    assert not looks_stacked("model.layers.0.mixer.conv1d.weight", (64, 1, 4))
    assert not looks_stacked("model.layers.0.attention.time_maa", (5, 1, 64))
    assert not looks_stacked("model.layers.0.mlp.experts.0.up_proj.weight", (128, 64))


def test_weights_stored_transposed_are_refused():
    check_orientation("transformer.h.0.attn.c_attn.weight", {"model_type": "llama"})
    with pytest.raises(FourfoldError, match=r"c_attn.weight is stored as \[in, out\].*`keep`"):
        check_orientation("transformer.h.0.attn.c_attn.weight", {"model_type": "gpt2"})
