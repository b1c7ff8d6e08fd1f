"""What cannot be rounded is said before anything is written; what is found while reading names its tensor."""

import re

import pytest
import torch
from compress_models import build_moe, change_tensor
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model

from fourfold.compress import load_recipe, plan, quantize
from fourfold.core.errors import FourfoldError, UsageError

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def llama(tmp_path):
    return build_tiny_model(tmp_path / "source")


def test_a_width_that_is_no_multiple_of_the_block(tmp_path):
    source = build_tiny_model(tmp_path / "source", intermediate_size=80)
    keep = "model.layers.*.mlp.down_proj"
    words = (
        r"model.layers.0.mlp.down_proj.weight has the shape \[64, 80\].*no multiple of 32.*`keep` entry "
        f"'{re.escape(keep)}'"
    )
    for call in (lambda: plan(source), lambda: quantize(source, tmp_path / "out")):
        with pytest.raises(FourfoldError, match=words):
            call()
    assert not list(tmp_path.glob("out*"))
    recipe = load_recipe("mxfp4").model_copy(update={"keep": [keep]})
    quantize(source, tmp_path / "out", recipe)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_what_is_said_of_one_expert_holds_for_all(tmp_path, model_type):
    source = build_moe(tmp_path / "source", model_type, intermediate_size=80, num_hidden_layers=2)
    with pytest.raises(FourfoldError, match=r"experts\.0\.\w+\.weight has the shape \[64, 80\]") as error:
        plan(source)
    (keep,) = re.findall(r"`keep` entry '([^']*)'", str(error.value))
    dry_run = plan(source, load_recipe("mxfp4").model_copy(update={"keep": [keep]}))
    assert sum(".experts." in tensor.name for tensor in dry_run.quantized) == 2 * 4 * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(llama, tmp_path, value):
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    change_tensor(llama, UP, spoil)
    with pytest.raises(FourfoldError, match=f"{UP} holds NaN or Inf"):
        quantize(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["mxfp4", "bf16"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_kept_weight_that_is_not_finite_is_named_as_well(llama, tmp_path, name, recipe):
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[7] = float("nan")
        return tensor

    change_tensor(llama, name, spoil)
    module = name.removesuffix(".weight")
    with pytest.raises(FourfoldError, match=f"{name} holds NaN or Inf.*`keep` entry '{module}'"):
        quantize(llama, tmp_path / "out", recipe)
    wanted = load_recipe(recipe).model_copy(update={"keep": [module]})
    quantize(llama, tmp_path / "meant", wanted)
    assert load_file(tmp_path / "meant" / "model.safetensors")[name].isnan().any()


def test_a_dtype_that_is_not_rounded_from(llama):
    change_tensor(llama, UP, lambda tensor: tensor.to(torch.float8_e4m3fn))
    with pytest.raises(FourfoldError, match=f"{UP} is stored as float8_e4m3fn.*bf16 first"):
        plan(llama)


def test_experts_in_an_unknown_layout_are_never_kept_in_silence(llama):
    name = "model.layers.0.mlp.experts.w13_weight"
    tensors = load_file(llama / "model.safetensors") | {name: torch.zeros(4, 64, 64)}
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FourfoldError, match=r"w13_weight \[4, 64, 64\] looks like several linear layers"):
        plan(llama)
    recipe = load_recipe("mxfp4").model_copy(update={"keep": [name]})
    assert name in {tensor.name for tensor in plan(llama, recipe).kept}


def test_a_source_that_is_quantized_already(llama, tmp_path):
    quantize(llama, tmp_path / "once")
    with pytest.raises(UsageError, match=r"quantized already \(mxfp4\).*fourfold convert"):
        quantize(tmp_path / "once", tmp_path / "twice")


def test_a_missing_tokenizer_is_noticed_before_the_work(llama, tmp_path):
    for file in llama.glob("tokenizer*"):
        file.unlink()
    for call in (lambda: plan(llama), lambda: quantize(llama, tmp_path / "out")):
        with pytest.raises(FourfoldError, match=r"holds no tokenizer.*Copy the tokenizer's files"):
            call()
    assert not list(tmp_path.glob("out*"))


def test_a_recipe_that_meets_nothing(llama):
    recipe = load_recipe("mxfp4").model_copy(update={"keep": ["*"]})
    with pytest.raises(UsageError, match="rounds nothing in"):
        plan(llama, recipe)


def test_a_source_without_tensors(llama, tmp_path):
    save_file({}, llama / "model.safetensors")
    for call in (lambda: plan(llama, "bf16"), lambda: quantize(llama, tmp_path / "out", "bf16")):
        with pytest.raises(FourfoldError, match="holds no tensors"):
            call()


def test_an_existing_output_is_left_alone(llama, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        quantize(llama, tmp_path / "out")


def test_a_dialect_that_cannot_hold_the_result(llama, tmp_path):
    for call in (
        lambda: plan(llama, dialect="plain"),
        lambda: quantize(llama, tmp_path / "out", dialect="plain"),
    ):
        with pytest.raises(UsageError, match="cannot express"):
            call()
    assert not list(tmp_path.glob("out*"))
