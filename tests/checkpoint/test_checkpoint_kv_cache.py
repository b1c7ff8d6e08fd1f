"""KV cache scales: stored as each dialect names them, read back, converted, verified, refused."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import projections, quantize_folder
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model

from fourfold.checkpoint import CheckpointWriter, open_checkpoint
from fourfold.checkpoint.convert import convert, copy_shards
from fourfold.checkpoint.verify import verify
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import Quantization

MODULES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "kv"]


def head_scales(count: int = 2) -> dict[str, torch.Tensor]:
    """Different numbers for every module and head."""
    return {m: torch.arange(1, count + 1) * 0.1 + i for i, m in enumerate(MODULES)}


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Change or drop stored tensors."""
    file = folder / "model.safetensors"
    tensors = {name: value for name, value in (load_file(file) | changes).items() if value is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    for name in ("fourfold.json", "fourfold-tensors.json"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("dialect", "name", "shape"),
    [("compressed-tensors", "k_scale", (1,)), ("quark", "k_proj.output_scale", ())],
)
def test_an_fp8_kv_cache_has_scales_of_one(tiny_llama, tmp_path, dialect, name, shape):
    folder = quantize_folder(tiny_llama, tmp_path / "out", dialect, projections(), kv_cache="fp8")
    stored = load_file(folder / "model.safetensors")
    for letter in "kv":
        scale = stored[f"model.layers.1.self_attn.{name.replace('k_', letter + '_')}"]
        assert scale.shape == shape and scale.item() == 1.0
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization.kv_cache == "fp8" and len(checkpoint.kv_scales) == 4
    assert not [n for n in checkpoint.names() if n.endswith("scale")]


def test_scales_per_head_come_back(tiny_llama, tmp_path):
    options = {"kv_cache": "fp8-head", "kv_scales": head_scales()}
    folder = quantize_folder(tiny_llama, tmp_path / "out", "compressed-tensors", projections(), **options)
    stored = load_file(folder / "model.safetensors")["model.layers.1.self_attn.v_scale"]
    assert stored.shape == (2, 1, 1) and stored.dtype == torch.float32
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization.kv_cache == checkpoint.card().kv_cache_format == "fp8-head"
    assert checkpoint.kv_scales.keys() == set(MODULES)
    for module, scale in head_scales().items():
        assert torch.equal(checkpoint.kv_scales[module], scale)
    assert verify(folder).passed


def test_the_scheme_is_the_one_that_llm_compressor_writes(tiny_llama, tmp_path):
    """Copied from its output (0.14.0.1, QuantizationModifier, kv_cache_scheme), with scales [2, 1, 1]."""
    written = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "attn_head",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }
    options = {"kv_cache": "fp8-head", "kv_scales": head_scales()}
    folder = quantize_folder(tiny_llama, tmp_path / "out", "compressed-tensors", lambda _: None, **options)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"] == written
    assert settings["config_groups"] == {} and settings["format"] == "dense"


def test_the_library_takes_the_scheme_per_head(tiny_llama, tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    options = {"kv_cache": "fp8-head", "kv_scales": head_scales()}
    folder = quantize_folder(tiny_llama, tmp_path / "out", "compressed-tensors", projections(), **options)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate({k: v for k, v in settings.items() if k != "fourfold"})
    assert scheme.kv_cache_scheme is not None and scheme.kv_cache_scheme.strategy == "attn_head"
    assert scheme.kv_cache_scheme.num_bits == 8 and scheme.kv_cache_scheme.dynamic is False


def test_the_library_holds_scales_of_the_same_names_and_shapes(tiny_llama, tmp_path):
    """transformers builds the model with the library's own parameters and loads ours without a remainder."""
    from transformers import AutoModelForCausalLM

    options = {"kv_cache": "fp8-head", "kv_scales": head_scales()}
    folder = quantize_folder(
        tiny_llama, tmp_path / "out", "compressed-tensors", projections("fp8-channel"), **options
    )
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for i, module in enumerate(MODULES):
        attention = model.get_submodule(module.rpartition(".")[0])
        loaded = getattr(attention, f"{'kv'[i % 2]}_scale").float().flatten()
        torch.testing.assert_close(loaded, head_scales()[module], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("dialect", "form", "remedy"),
    [
        ("quark", "fp8-head", "kv_cache: fp8, or --dialect compressed-tensors"),
        ("quark", "mxfp4", "--kv-cache mxfp4"),
        ("compressed-tensors", "mxfp4", "--kv-cache mxfp4"),
        ("compressed-tensors", "mxfp8-e4m3", "--kv-cache mxfp8-e4m3"),
        ("plain", "fp8", "compressed-tensors or quark"),
    ],
)
def test_what_a_dialect_cannot_say_is_refused(tiny_llama, tmp_path, dialect, form, remedy):
    scheme = projections() if dialect != "plain" else lambda _: None
    with pytest.raises(UsageError, match=f"{dialect} cannot say that the KV cache is {form}.*{remedy}"):
        quantize_folder(tiny_llama, tmp_path / "out", dialect, scheme, kv_cache=form)
    assert not list(tmp_path.iterdir())


def test_scales_may_follow_the_plan(tiny_llama, tmp_path):
    """A calibrated run knows them after its layers, which lie in the folder that the writer makes."""
    source = open_checkpoint(tiny_llama)
    infos = [source.info(name) for name in source.names()]
    scheme = Quantization(kv_cache="fp8-head")
    writer = CheckpointWriter(
        *(tmp_path / "out", "compressed-tensors", source.config, scheme, infos),
        fingerprint={},
        kv_scales_follow=True,
    )
    with pytest.raises(AssertionError), writer.shard(0):
        pass
    with pytest.raises(UsageError, match="--calibration"):
        writer.hold_kv_scales({})
    writer.hold_kv_scales(head_scales())
    copy_shards(source, writer)
    writer.finish(source=str(tiny_llama))
    found = open_checkpoint(tmp_path / "out").kv_scales
    assert all(torch.equal(found[module], scale) for module, scale in head_scales().items())


def test_scales_per_head_are_not_converted_to_quark(tiny_llama, tmp_path):
    options = {"kv_cache": "fp8-head", "kv_scales": head_scales()}
    folder = quantize_folder(tiny_llama, tmp_path / "first", "compressed-tensors", projections(), **options)
    with pytest.raises(UsageError, match="quark cannot say that the KV cache is fp8-head"):
        convert(folder, tmp_path / "quark", "quark")
    convert(folder, tmp_path / "again", "compressed-tensors")
    again = open_checkpoint(tmp_path / "again").kv_scales
    assert all(torch.equal(again[module], scale) for module, scale in head_scales().items())


@pytest.mark.parametrize(
    ("scales", "error", "match"),
    [
        ({}, UsageError, "--calibration"),
        (head_scales(3), FourfoldError, "holds 3 numbers where the cache has 2"),
        (
            head_scales() | {MODULES[2]: torch.tensor([1.0, torch.inf])},
            FourfoldError,
            "not a positive number",
        ),
        (head_scales() | {MODULES[2]: torch.tensor([0.0, 1.0])}, FourfoldError, "1.self_attn.k_proj"),
    ],
)
def test_scales_per_head_must_be_there_and_be_numbers(tiny_llama, tmp_path, scales, error, match):
    options = {"kv_cache": "fp8-head", "kv_scales": scales}
    with pytest.raises(error, match=match):
        quantize_folder(tiny_llama, tmp_path / "out", "compressed-tensors", projections(), **options)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (None, "k_proj has no KV scale for fp8-head"),
        (torch.tensor([1.0, torch.nan]).view(2, 1, 1), "k_proj is not a positive number"),
        (torch.tensor([1.0, -1.0]).view(2, 1, 1), "k_proj is not a positive number"),
        (torch.ones(4, 1, 1), "k_proj holds 4 numbers where the cache has 2"),
    ],
)
def test_verify_looks_at_the_scales(tiny_llama, tmp_path, change, match):
    options = {"kv_cache": "fp8-head", "kv_scales": head_scales()}
    folder = quantize_folder(tiny_llama, tmp_path / "out", "compressed-tensors", projections(), **options)
    rewrite(folder, {"model.layers.1.self_attn.k_scale": change})
    (problem,) = verify(folder).problems
    assert match in problem


def test_many_numbers_under_a_scheme_of_one_are_refused(tiny_llama, tmp_path):
    folder = quantize_folder(
        tiny_llama, tmp_path / "out", "compressed-tensors", projections(), kv_cache="fp8"
    )
    rewrite(folder, {"model.layers.1.self_attn.k_scale": torch.ones(2)})
    with pytest.raises(FourfoldError, match=r"k_scale.*one number for a whole cache"):
        open_checkpoint(folder)


def test_image_towers_have_no_kv_cache(tmp_path):
    from fourfold.checkpoint import TensorInfo
    from fourfold.checkpoint.kv_scales import unit_scales

    names = ["model.language_model.layers.0.self_attn.k_proj", "model.vision_tower.layers.0.self_attn.k_proj"]
    infos = [TensorInfo(f"{name}.weight", (32, 32), torch.bfloat16, None, 2048) for name in names]
    config = {"text_config": {"num_key_value_heads": 4}}
    (module, scale), *others = unit_scales("fp8-head", infos, config).items()
    assert module == names[0] and torch.equal(scale, torch.ones(4)) and not others


def test_a_config_without_heads_is_told(tmp_path):
    source = build_tiny_model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["num_key_value_heads"], config["num_attention_heads"]
    (source / "config.json").write_text(json.dumps(config))
    options = {"kv_cache": "fp8-head", "kv_scales": head_scales()}
    with pytest.raises(FourfoldError, match="no usable num_key_value_heads"):
        quantize_folder(source, tmp_path / "out", "compressed-tensors", projections(), **options)
