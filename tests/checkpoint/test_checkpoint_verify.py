"""verify finds what is wrong with a folder; convert changes names and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import projections, quantize_folder
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model

from fourfold.checkpoint import open_checkpoint
from fourfold.checkpoint.convert import convert
from fourfold.checkpoint.fingerprint import source_fingerprint
from fourfold.checkpoint.verify import verify
from fourfold.core.errors import UsageError

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def mxfp4_folder(tmp_path_factory, tiny_llama) -> Path:
    """The tiny Llama in MXFP4, compressed-tensors."""
    out = tmp_path_factory.mktemp("quantized") / "mxfp4"
    return quantize_folder(tiny_llama, out, "compressed-tensors", projections())


@pytest.fixture
def copy(mxfp4_folder, tmp_path) -> Path:
    return Path(shutil.copytree(mxfp4_folder, tmp_path / "copy"))


def change_tensors(folder: Path, change) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    forget(folder)


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    forget(folder)


def forget(folder: Path) -> None:
    """Take the hashes away, so that more than they has to find what is wrong."""
    (folder / "fourfold.json").unlink()
    (folder / "fourfold-tensors.json").unlink()


def problem(folder: Path) -> str:
    report = verify(folder)
    assert not report.passed and len(report.problems) == 1
    return report.problems[0]


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_what_we_write_passes(tiny_llama, tmp_path, dialect):
    options = {"kv_cache": "fp8", "max_shard_bytes": 20_000}
    folder = quantize_folder(tiny_llama, tmp_path / "out", dialect, projections("mxfp4", "mxfp4"), **options)
    report = verify(folder)
    assert report.passed and report.problems == [] and report.dialect == dialect
    assert report.quantized_tensors == 14 and report.tensors == 21
    assert report.files_hashed == len(list(folder.iterdir())) - 1


def test_a_plain_folder_passes(tiny_llama):
    assert verify(tiny_llama).passed


def test_a_flipped_bit_is_found(copy):
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(content))
    file, tensor = verify(copy).problems
    assert "model.safetensors is not what was written" in file
    assert tensor.startswith("model.layers.") and "not the tensor that was in memory" in tensor


def test_a_missing_and_an_added_file_are_found(copy):
    (copy / "tokenizer.json").unlink()
    save_file({"x": torch.ones(1)}, copy / "more.safetensors")
    problems = " ".join(verify(copy).problems)
    assert "tokenizer.json is missing" in problems and "more.safetensors is not in fourfold.json" in problems


def test_a_missing_manifest_is_found_and_tensors_are_compared_all_the_same(copy):
    (copy / "fourfold.json").unlink()
    assert problem(copy).startswith("fourfold.json is missing")
    tensors = load_file(copy / "model.safetensors")
    one, other = (f"model.layers.{layer}.mlp.up_proj.weight_packed" for layer in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, copy / "model.safetensors")
    _, *found = verify(copy).problems
    assert len(found) == 2 and all("not the tensor that was in memory" in problem for problem in found)


def test_a_scale_that_is_no_number_is_found(copy):
    def change(tensors):
        tensors[f"{UP}.weight_scale"][3, 1] = 0xFF
        return tensors

    change_tensors(copy, change)
    assert problem(copy) == f"{UP}.weight has 1 scales that are no numbers. Quantize the source again."


def test_a_shape_against_the_configuration_is_found(copy):
    change_config(copy, lambda config: config | {"vocab_size": 300})
    problems = verify(copy).problems
    assert len(problems) == 2 and "[256, 64], but config.json asks for [300, 64]" in problems[0]


def test_layers_of_several_shapes_are_no_problem(tmp_path):
    sizes = {
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 64,
        "sliding_window": 8,
    }
    small = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 0}
    folder = build_tiny_model(tmp_path / "model", "gemma4_text", **sizes, **small)
    stored = load_file(folder / "model.safetensors")
    first, second = (stored[f"model.layers.{layer}.self_attn.k_proj.weight"] for layer in (0, 1))
    assert first.shape != second.shape
    assert verify(folder).passed


def test_missing_layers_are_found(copy):
    change_config(copy, lambda config: config | {"num_hidden_layers": 3})
    assert "Layer 2 of the 3" in problem(copy)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_a_kept_layer_that_the_configuration_forgets_is_found(tiny_llama, tmp_path, dialect):
    folder = quantize_folder(tiny_llama, tmp_path / "out", dialect, projections())

    def silence(config):
        config["quantization_config"] |= {"ignore": [], "exclude": []}
        return config

    change_config(folder, silence)
    assert "lm_head is stored unquantized" in problem(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_a_kept_weight_of_a_wrong_dtype_is_found(copy, dtype):
    name = "lm_head.weight"
    change_tensors(copy, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    found = problem(copy)
    assert name in found and str(dtype).removeprefix("torch.") in found and "without scales" in found


def test_integers_that_are_no_weights_are_not_complained_of(copy):
    change_tensors(copy, lambda tensors: tensors | {"model.position_ids": torch.arange(8)})
    assert verify(copy).passed


def test_damage_that_stops_reading_is_a_problem_too(copy):
    (copy / "config.json").write_text("{")
    problems = verify(copy).problems
    assert any("config.json is not what was written" in p for p in problems)
    assert any("not valid JSON" in p for p in problems)


def test_verify_needs_a_folder(tmp_path):
    with pytest.raises(UsageError, match="is no folder"):
        verify(tmp_path / "nothing")


def test_an_unfinished_run_is_told_as_such(tiny_llama, tmp_path):
    quantize_folder(tiny_llama, tmp_path / "out", "quark", projections(), stop_after=0)
    with pytest.raises(UsageError, match=r"out\.partial belongs to a run that has not finished.*--resume"):
        verify(tmp_path / "out.partial")


def test_there_and_back_changes_no_byte_of_a_tensor(tiny_llama, tmp_path):
    scheme = projections("mxfp4", "mxfp8-e4m3")
    first = quantize_folder(tiny_llama, tmp_path / "ct", "compressed-tensors", scheme, kv_cache="fp8")
    convert(first, tmp_path / "quark", "quark")
    convert(tmp_path / "quark", tmp_path / "back", "compressed-tensors")
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "back/model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (tmp_path / "back/config.json").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (tmp_path / "quark/model.safetensors").read_bytes()
    assert verify(tmp_path / "quark").passed and verify(tmp_path / "back").passed


def test_notes_recipe_and_calibrated_scales_come_along(tiny_llama, tmp_path):
    first = quantize_folder(tiny_llama, tmp_path / "ct", "compressed-tensors", projections(), kv_cache="fp8")
    name = "model.layers.0.self_attn.v_scale"
    save_file(
        load_file(first / "model.safetensors") | {name: torch.tensor([0.375])},
        first / "model.safetensors",
        metadata={"format": "pt"},
    )
    manifest = json.loads((first / "fourfold.json").read_text())
    manifest["card"]["notes"], manifest["recipe"] = ["A note."], {"name": "mxfp4"}
    (first / "fourfold.json").write_text(json.dumps(manifest))
    convert(first, tmp_path / "quark", "quark")
    converted = open_checkpoint(tmp_path / "quark")
    assert converted.card().notes == ["A note."] and converted.manifest is not None
    assert converted.manifest.recipe == {"name": "mxfp4"}
    assert converted.kv_scales["model.layers.0.self_attn.v_proj"] == 0.375


def test_an_fp8_kv_cache_alone_can_be_converted(tiny_llama, tmp_path):
    first = quantize_folder(
        tiny_llama, tmp_path / "first", "compressed-tensors", lambda _: None, kv_cache="fp8"
    )
    convert(first, tmp_path / "again", "compressed-tensors")
    again = open_checkpoint(tmp_path / "again")
    assert again.quantization.kv_cache == "fp8" and again.manifest is not None
    assert again.manifest.dialect == again.dialect == "compressed-tensors"
    with pytest.raises(UsageError, match="quark cannot store an FP8 KV cache"):
        convert(first, tmp_path / "quark", "quark")


def test_the_manifest_of_what_is_not_quantized_says_plain(tiny_llama, tmp_path):
    folder = quantize_folder(tiny_llama, tmp_path / "out", "compressed-tensors", lambda _: None)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.manifest is not None and checkpoint.manifest.dialect == checkpoint.dialect == "plain"


def test_the_card_says_that_weights_are_without_a_tokenizer(tiny_llama, tmp_path):
    source = quantize_folder(tiny_llama, tmp_path / "ct", "compressed-tensors", projections())
    for file in source.glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    convert(source, tmp_path / "without", "quark")
    (note,) = open_checkpoint(tmp_path / "without").card().notes
    assert "without a tokenizer" in note
    convert(tmp_path / "without", tmp_path / "still", "compressed-tensors")
    assert open_checkpoint(tmp_path / "still").card().notes == [note]
    for file in tmp_path.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "without")
    convert(tmp_path / "without", tmp_path / "with", "compressed-tensors")
    assert open_checkpoint(tmp_path / "with").card().notes == []


def test_a_source_is_known_again_in_another_place_and_not_with_other_weights(tiny_llama, tmp_path):
    moved = Path(shutil.copytree(tiny_llama, tmp_path / "moved"))
    known = source_fingerprint(open_checkpoint(tiny_llama))
    assert source_fingerprint(open_checkpoint(moved)) == known
    tensors = load_file(moved / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, moved / "model.safetensors", metadata={"format": "pt"})
    assert source_fingerprint(open_checkpoint(moved)) != known


def test_what_cannot_be_converted_is_refused_before_writing(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="nothing quantized"):
        convert(tiny_llama, tmp_path / "out", "quark")
    folder = quantize_folder(tiny_llama, tmp_path / "ct", "compressed-tensors", projections("mxfp8-e4m3"))
    with pytest.raises(UsageError, match="quark cannot express weights in mxfp8-e4m3"):
        convert(folder, tmp_path / "out", "quark")
    assert not (tmp_path / "out.partial").exists()
