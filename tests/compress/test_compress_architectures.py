"""Calibration's layers, one after the other, compute what transformers' whole model computes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    ARCHITECTURES,
    build_architecture,
    build_tiny_model,
    tiny_config,
    write_tiny_tokenizer,
)

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import Recipe, load_recipe, quantize
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.whole import WholeModel
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.model import Model
from fourfold.compress.resolve import resolve
from fourfold.core.errors import FourfoldError
from fourfold.formats import get_format

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
    assert {name.rpartition(".")[2] for name in linears - rounded} <= {"shared_expert_gate"}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_whole_model_gives_the_logits_of_transformers(models, model_type):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        ours = WholeModel(skeleton_of(models(model_type)))(TOKENS)
        theirs = AutoModelForCausalLM.from_pretrained(models(model_type), dtype=torch.float32)(TOKENS).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


VISION = {"hidden_size": 32, "intermediate_size": 64, "depth": 3, "num_hidden_layers": 3, "num_heads": 2}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": 64}
MULTIMODAL = {
    "gemma3": ("gemma3_text", {"mm_tokens_per_image": 4}, {}),
    "mistral3": ("mistral", {}, {"model_type": "pixtral"}),
    "qwen3_5": ("qwen3_5_text", {}, {"num_position_embeddings": 16}),
}


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_the_decoder_of_a_multimodal_model_is_found_under_its_names(tmp_path, model_type):
    """The vision tower has more layers than the decoder, and lists of the same name."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, changes, vision = MULTIMODAL[model_type]
    text_config = tiny_config(text, **ARCHITECTURES[text])
    config = AutoConfig.for_model(
        model_type, text_config=text_config, vision_config=VISION | vision, **changes
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    write_tiny_tokenizer(tmp_path)
    skeleton = skeleton_of(tmp_path)
    assert "language_model" in skeleton.prefix(1)
    last = through_layers(skeleton, [TOKENS])[-1][0]
    net = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    seen = []
    net.model.language_model.layers[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        net(input_ids=TOKENS, use_cache=False)
    assert torch.allclose(last, seen[0], rtol=1e-4, atol=1e-5 * float(last.abs().max()))


def test_what_cannot_be_repeated_is_refused_with_the_reason(tmp_path):
    """gemma4 hands each layer embeddings of the tokens; falcon_h1 computes a buffer outside the module;
    glm_moe_dsa hands the tokens that a layer attends to on to the next.
    """
    sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    per_layer = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32, "global_head_dim": 32}
    build_tiny_model(tmp_path / "gemma4", "gemma4_text", num_kv_shared_layers=0, **per_layer, **sliding)
    with pytest.raises(FourfoldError, match="depends on the tokens"):
        skeleton_of(tmp_path / "gemma4").enter([TOKENS[:1], TOKENS[1:2]])
    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    build_tiny_model(tmp_path / "falcon", "falcon_h1", mamba_n_groups=1, **mamba)
    with pytest.raises(FourfoldError, match=r"mamba\.mup_vector in a way that Fourfold cannot repeat"):
        skeleton_of(tmp_path / "falcon").materialise(0)
    build_tiny_model(tmp_path / "glm", "glm_moe_dsa", **ARCHITECTURES["deepseek_v3"])
    with pytest.raises(FourfoldError, match="takes more from its layers than hidden states"):
        skeleton_of(tmp_path / "glm").enter([TOKENS])


def test_a_model_of_no_known_type_and_a_tensor_that_is_missing_are_refused(models):
    model = resolve(open_checkpoint(models("llama")), load_recipe("mxfp4")).model
    unknown = Model(model.config | {"model_type": "nobody"}, model.entries, model.quantization)
    with pytest.raises(FourfoldError, match="cannot build a causal language model of the type 'nobody'"):
        Skeleton(unknown, torch.device("cpu"))
    del model.entries["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(FourfoldError, match=r"expects a parameter model\.layers\.1\.mlp\.up_proj\.weight"):
        Skeleton(model, torch.device("cpu"))


def test_layers_that_transformers_does_not_build_are_rounded_to_nearest_and_told(models, tmp_path):
    """As DeepSeek-V3 stores its layer of multi-token prediction."""
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    extra = {
        n.replace("layers.1.", "layers.2."): v.clone() for n, v in tensors.items() if "layers.1.mlp" in n
    }
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(name="test", rules=[{"weight": "mxfp4"}], passes=["gptq"])
    manifest = quantize(folder, tmp_path / "out", recipe, calibration=CalibrationSet(TOKENS, "random", 3))
    (note,) = manifest.card.notes
    assert note.startswith("3 weights are in no linear layer of the decoder")
    written = open_checkpoint(tmp_path / "out").load("model.layers.2.mlp.up_proj.weight")
    nearest = get_format("mxfp4").quantize(extra["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(written.blocks, nearest.blocks)
