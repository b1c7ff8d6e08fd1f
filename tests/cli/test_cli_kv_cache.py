"""--kv-cache: one option for serve, generate and evaluate, and its refusals."""

import json


def test_an_unknown_format_is_misuse_everywhere(fourfold, tiny_llama):
    for words in (["generate", "--prompt", "a"], ["evaluate"], ["serve"]):
        verb, *options = words
        outcome = fourfold(verb, tiny_llama, *options, "--kv-cache", "int3")
        assert outcome.code == 2
        assert "no KV cache format 'int3'" in outcome.err and "mxfp4" in outcome.err


def test_scales_of_heads_cannot_be_had_at_run_time(fourfold, tiny_llama):
    outcome = fourfold("generate", tiny_llama, "--prompt", "a", "--kv-cache", "fp8-head")
    assert outcome.code == 2 and "kv_cache: fp8-head" in " ".join(outcome.err.split())


def test_evaluate_sees_the_loss_of_the_cache_alone(fourfold, tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Ships sail on the sea, and trains run on rails. " * 12)
    record = tmp_path / "quality.json"
    outcome = fourfold(
        *(
            "evaluate",
            tiny_llama,
            "--against",
            tiny_llama,
            "--text",
            text,
            "--window-tokens",
            64,
            "--threads",
            1,
        ),
        *("--kv-cache", "mxfp4", "--json", record),
    )
    assert outcome.code == 0, outcome.err
    told = json.loads(record.read_text())
    assert told["model"]["kv_cache_format"] == "mxfp4" and told["base"]["kv_cache_format"] is None
    assert told["overall"]["kl_divergence"]["value"] > 0


def test_a_recipe_with_an_mx_cache_is_told_the_option(fourfold, tiny_llama, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: mine\nrules: [{weight: mxfp4}]\npasses: [rtn]\nkv_cache: mxfp4\n")
    outcome = fourfold("quantize", tiny_llama, tmp_path / "out", "--recipe", recipe)
    assert outcome.code == 2 and "--kv-cache mxfp4" in " ".join(outcome.err.split())
