"""The way a user goes, on a tiny model: quantize, verify, convert, evaluate, generate, look at formats."""

import json

import pytest

from fourfold.cli.records import QuantizationRecord
from fourfold.compress import DryRun
from fourfold.core.records import EvaluationRecord
from fourfold.formats.numbers.survey import FormatSurvey

SMALL = ("--window-tokens", 64, "--max-tokens-per-text", 256, "--threads", 1)


@pytest.mark.e2e
def test_the_whole_way(fourfold, tiny_llama, tmp_path):
    mxfp4, quark, figures = tmp_path / "mxfp4", tmp_path / "quark", tmp_path / "quality.json"
    assert fourfold("quantize", tiny_llama, mxfp4, "--json", tmp_path / "q.json").code == 0
    record = QuantizationRecord.model_validate_json((tmp_path / "q.json").read_text())
    assert record.card.weight_format == "mxfp4" and record.source_card.weight_format == "bf16"
    assert record.card.size_bytes < record.source_card.size_bytes
    assert record.seconds > 0 and record.peak_memory_bytes > 10_000_000

    assert fourfold("verify", mxfp4).code == 0
    assert fourfold("convert", mxfp4, quark, "--dialect", "quark").code == 0
    assert fourfold("verify", quark).code == 0

    outcome = fourfold("evaluate", mxfp4, "--against", tiny_llama, *SMALL, "--json", figures)
    assert outcome.code == 0, outcome.err
    evaluation = EvaluationRecord.model_validate_json(figures.read_text())
    assert set(json.loads(figures.read_text())["overall"]) >= {
        "perplexity",
        "perplexity_base",
        "kl_divergence",
        "top1_agreement",
    }
    overall = evaluation.overall
    assert 0 < overall.kl_divergence.low < overall.kl_divergence.value < overall.kl_divergence.high
    assert 0 < overall.top1_agreement.value < 1
    assert "overall" in outcome.out and "mxfp4" in outcome.out

    # the two dialects hold the same numbers, so the models are the same model
    same = fourfold(
        "evaluate", quark, "--against", mxfp4, *SMALL, "--gate", "kl_divergence=0", "--json", figures
    )
    assert same.code == 0, same.err
    assert json.loads(figures.read_text())["overall"]["top1_agreement"]["value"] == 1

    texts = [
        fourfold("generate", folder, "--prompt", "Hello", "--max-tokens", 8) for folder in (mxfp4, quark)
    ]
    assert [text.code for text in texts] == [0, 0]
    assert texts[0].out == texts[1].out


def test_gates_decide_the_exit_code(fourfold, tiny_llama, tmp_path):
    record = tmp_path / "e.json"
    kept = fourfold("evaluate", tiny_llama, *SMALL, "--gate", "perplexity=100000")
    assert kept.code == 0 and "kept" in kept.out and "not kept" not in kept.out
    words = ("--against", tiny_llama, *SMALL, "--gate", "top1_agreement=1", "--gate", "perplexity=1.5")
    failed = fourfold("evaluate", tiny_llama, *words, "--json", record)
    assert failed.code == 1 and "not kept" in failed.out
    gates = {g["metric"]: g["passed"] for g in json.loads(record.read_text())["gates"]}
    assert gates == {"top1_agreement": True, "perplexity": False}


def test_a_limit_inside_the_interval_is_told(fourfold, tiny_llama, tmp_path):
    fourfold("evaluate", tiny_llama, *SMALL, "--json", tmp_path / "e.json")
    value = json.loads((tmp_path / "e.json").read_text())["overall"]["perplexity"]["value"]
    assert (
        "contains the limit" in fourfold("evaluate", tiny_llama, *SMALL, "--gate", f"perplexity={value}").out
    )
    assert (
        "contains the limit" not in fourfold("evaluate", tiny_llama, *SMALL, "--gate", "perplexity=9e9").out
    )


def test_own_texts_replace_those_of_the_package(fourfold, tiny_llama, tmp_path):
    (tmp_path / "mine.txt").write_text("Every man is a piece of the continent. " * 20)
    words = ("--text", tmp_path / "mine.txt", "--json", tmp_path / "e.json")
    assert fourfold("evaluate", tiny_llama, *SMALL, *words).code == 0
    record = EvaluationRecord.model_validate_json((tmp_path / "e.json").read_text())
    assert set(record.texts) == {"mine"} and record.window_tokens == 64


def test_a_dry_run_writes_nothing(fourfold, tiny_llama, tmp_path):
    outcome = fourfold(
        "quantize", tiny_llama, tmp_path / "out", "--dry-run", "--json", tmp_path / "plan.json"
    )
    assert outcome.code == 0
    assert "model.layers.*.mlp.up_proj.weight" in outcome.out and "Nothing was written" in outcome.out
    assert DryRun.model_validate_json((tmp_path / "plan.json").read_text()).quantized
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_keep_entry_that_keeps_nothing_is_told(fourfold, tiny_llama, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("{name: mine, keep: ['*.[mn]lp'], rules: [{weight: mxfp4}], passes: [rtn]}")
    for words in (["--dry-run"], []):
        outcome = fourfold("quantize", tiny_llama, tmp_path / "out", "--recipe", recipe, *words)
        assert outcome.code == 0
        assert "Note: Nothing in this model matches what the recipe names: '*.[mn]lp'." in outcome.out


def test_names_with_brackets_are_printed_as_they_are(fourfold, tiny_llama, tmp_path):
    out = tmp_path / "mine[bold]"
    assert "mine[bold]" in fourfold("quantize", tiny_llama, out).out
    assert "mine[bold]" in fourfold("verify", out).out


def test_verify_tells_a_changed_byte(fourfold, tiny_llama, tmp_path):
    fourfold("quantize", tiny_llama, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    outcome = fourfold("verify", tmp_path / "out")
    assert outcome.code == 1
    assert "model.safetensors" in outcome.out + outcome.err


def test_verify_says_when_there_is_nothing_to_compare_with(fourfold, tiny_llama):
    outcome = fourfold("verify", tiny_llama)
    assert outcome.code == 0 and "with no hashes to compare with" in outcome.out


def test_formats_of_a_model(fourfold, tiny_llama, tmp_path):
    outcome = fourfold("formats", tiny_llama, "--max-tensors", 3, "--json", tmp_path / "f.json")
    assert outcome.code == 0
    record = FormatSurvey.model_validate_json((tmp_path / "f.json").read_text())
    assert record.checkpoint is not None and record.checkpoint.tensors == 3
    assert all(row.name in outcome.out for row in record.formats)
    by_name = {row.name: row for row in record.formats}
    assert by_name["mxfp4"].bits_per_value == by_name["int4-g64"].bits_per_value == 4.25


VERBS = "quantize convert verify evaluate generate chat serve bench report formats doctor"


@pytest.mark.parametrize("verb", VERBS.split())
def test_every_verb_has_help_with_an_example(fourfold, verb):
    outcome = fourfold(verb, "--help")
    assert outcome.code == 0
    assert f"fourfold {verb}" in outcome.out and "Example" in outcome.out
