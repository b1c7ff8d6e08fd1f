"""From folder to folder on a tiny Llama: the numbers, the kept tensors, the notes, and the dry run's
promises.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compress_models import read_all, tensor_bytes
from tiny_models import build_tiny_model

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import Recipe, load_recipe, plan, quantize, recipe_names
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.resolve import resolve
from fourfold.core.manifest import MANIFEST_NAME
from fourfold.formats import BlockTensor, get_format

RULES = [{"modules": ["*.mlp.*"], "weight": "mxfp8-e4m3"}, {"weight": "mxfp4", "scale_rule": "rceil"}]


def test_every_linear_weight_is_what_the_format_makes_of_it(tiny_llama, tmp_path):
    seen: list[tuple[int, int, str]] = []
    manifest = quantize(tiny_llama, tmp_path / "out", progress=lambda *step: seen.append(step))
    before, after = read_all(tiny_llama), open_checkpoint(tmp_path / "out")
    assert list(before) == sorted(after.names())
    rounded = 0
    for name, original in before.items():
        value = after.load(name)
        if isinstance(value, BlockTensor):
            rounded += 1
            expected = get_format("mxfp4").quantize(original, "even")
            assert torch.equal(value.scales, expected.scales)
            assert torch.equal(value.dequantize(), expected.dequantize())
        else:
            assert torch.equal(value, original) and value.dtype == original.dtype
    assert rounded == 14
    assert manifest.card.weight_format == "mxfp4"
    done = [bytes_done for bytes_done, _, _ in seen]
    assert done == sorted(done) and done[-1] == seen[0][1] == tensor_bytes(tmp_path / "out")
    assert len(seen) == len(before)


def test_the_first_rule_that_matches_decides_and_the_scheme_is_written(tiny_llama, tmp_path):
    recipe = load_recipe("mxfp4").model_copy(update={"name": "mixed"})
    recipe = type(recipe).model_validate({"name": "mixed", "rules": RULES, "passes": ["rtn"]})
    quantize(tiny_llama, tmp_path / "out", recipe)
    out = open_checkpoint(tmp_path / "out")
    assert out.info("model.layers.0.mlp.up_proj.weight").format == "mxfp8-e4m3"
    attention = out.quantization.layer("model.layers.0.self_attn.q_proj")
    assert attention is not None and (attention.weight, attention.scale_rule) == ("mxfp4", "rceil")
    assert out.manifest is not None and out.manifest.recipe == recipe.model_dump()


def test_patterns_that_match_nothing_are_noted_by_the_dry_run_and_the_run(tiny_llama, tmp_path):
    keep = ["lm_head", "model.norm", "*.[qkv]_proj", "model.layers.0.mlp.up_proj.weight", "*.mpl.*"]
    rules = [{"modules": ["*.experts.*", "*.o_proj"], "weight": "mxfp8-e4m3"}, {"weight": "mxfp4"}]
    recipe = Recipe.model_validate({"name": "own", "keep": keep, "rules": rules, "passes": ["rtn"]})
    (note,) = plan(tiny_llama, recipe).notes
    lost = "'model.layers.0.mlp.up_proj.weight', '*.mpl.*', '*.experts.*'"
    assert note.startswith(f"Nothing in this model matches what the recipe names: {lost}. ")
    assert quantize(tiny_llama, tmp_path / "out", recipe).card.notes == [note]


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_names_nothing_that_a_model_may_lack(tiny_llama, name):
    assert resolve(open_checkpoint(tiny_llama), load_recipe(name)).notes == []


def brief(recipe):
    """``recipe`` with little training: what is asked is whether it runs and what it leaves."""
    less = {"distill": {"steps": 4, "own": 16}}
    passes = [{use.name: use.options | less.get(use.name, {})} for use in recipe.uses]
    return recipe.model_copy(update={"passes": passes})


@pytest.mark.parametrize("name", [n for n in recipe_names() if n != "bf16"])
def test_shipped_recipes_reach_the_file_and_the_card(tiny_llama, tmp_path, name):
    token_ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = CalibrationSet(token_ids, "random", 0)
    quantize(tiny_llama, tmp_path / "out", brief(load_recipe(name)), calibration=calibration)
    card, rule = open_checkpoint(tmp_path / "out").card(), load_recipe(name).rules[0]
    assert (card.weight_format, card.activation_format) == (rule.weight, rule.activation)


def test_both_dialects_hold_the_same_numbers(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "a", "mxfp4", "compressed-tensors")
    quantize(tiny_llama, tmp_path / "b", "mxfp4", "quark")
    a, b = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    assert (a.dialect, b.dialect) == ("compressed-tensors", "quark")
    assert a.quantization.layers.keys() == b.quantization.layers.keys()
    for module in a.quantization.layers:
        one, other = a.load(f"{module}.weight"), b.load(f"{module}.weight")
        assert torch.equal(one.scales, other.scales)
        assert torch.equal(one.dequantize(), other.dequantize())


def test_an_fp8_kv_cache_is_recorded_and_counted(tiny_llama, tmp_path):
    recipe = load_recipe("mxfp4").model_copy(update={"kv_cache": "fp8"})
    quantize(tiny_llama, tmp_path / "out", recipe)
    out = open_checkpoint(tmp_path / "out")
    assert out.quantization.kv_cache == out.card().kv_cache_format == "fp8"
    assert len(out.kv_scales) == 4
    assert plan(tiny_llama, recipe).output_bytes == tensor_bytes(tmp_path / "out")


def test_an_import_casts_floats_and_changes_nothing_else(tmp_path):
    source = build_tiny_model(tmp_path / "source")
    bf16 = read_all(source)
    from safetensors.torch import save_file

    wide = {name: tensor.float() for name, tensor in bf16.items()} | {"model.steps": torch.arange(3)}
    save_file(wide, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "out", "bf16", "plain")
    after = read_all(tmp_path / "out")
    assert all(torch.equal(after[name], bf16[name]) and after[name].dtype == torch.bfloat16 for name in bf16)
    assert torch.equal(after["model.steps"], torch.arange(3))


def test_a_quantized_source_expands_to_bf16(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "packed")
    quantize(tmp_path / "packed", tmp_path / "wide", "bf16", "plain")
    packed, wide = open_checkpoint(tmp_path / "packed"), open_checkpoint(tmp_path / "wide")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(wide.load(name), packed.load(name).dequantize(torch.bfloat16))
    assert wide.quantization.layers == {}


def test_notes_and_tokenizer_go_along(tmp_path):
    source = build_tiny_model(tmp_path / "source")
    quantize(source, tmp_path / "one", "bf16", "plain")
    path = tmp_path / "one" / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["card"]["notes"] = ["weights were once rounded to Q4_1 (210 tensors)"]
    path.write_text(json.dumps(manifest))
    assert quantize(tmp_path / "one", tmp_path / "two").card.notes == manifest["card"]["notes"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "two" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("recipe", ["mxfp4", "bf16"])
@pytest.mark.parametrize("max_shard_bytes", [2_000_000_000, 40_000])
def test_the_dry_run_knows_the_output_to_the_byte(tiny_qwen3, tmp_path, recipe, max_shard_bytes):
    dialect = "plain" if recipe == "bf16" else "compressed-tensors"
    dry = plan(tiny_qwen3, recipe, max_shard_bytes=max_shard_bytes)
    assert not list(tmp_path.iterdir())
    manifest = quantize(tiny_qwen3, tmp_path / "out", recipe, max_shard_bytes=max_shard_bytes)
    # a folder in which nothing is quantized is a plain one, whatever dialect was asked for
    assert dry.dialect == manifest.dialect == dialect == open_checkpoint(tmp_path / "out").dialect
    assert dry.output_bytes == tensor_bytes(tmp_path / "out")
    assert dry.output_bytes == sum(tensor.nbytes for tensor in [*dry.quantized, *dry.kept])
    assert dry.shards == len(list((tmp_path / "out").glob("*.safetensors")))
    assert dry.source_bytes == tensor_bytes(tiny_qwen3)
    assert dry.time_estimate_s > 0


# VmHWM and not getrusage, whose maximum a child inherits from the test runner's own size
MEASURE = """
import re, sys
from pathlib import Path
from fourfold.compress import plan, quantize
predicted = plan(sys.argv[1]).peak_memory_bytes
quantize(sys.argv[1], sys.argv[2])
print(predicted, 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux's /proc")
def test_the_predicted_peak_is_not_exceeded_and_not_far_off(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 6144, "vocab_size": 32000}
    source = build_tiny_model(tmp_path / "source", num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    predicted, measured = map(int, done.stdout.split())
    assert measured <= predicted <= measured * 1.5
