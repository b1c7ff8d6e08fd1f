"""``fourfold quantize --budget``: the frontier shown and drawn, and the checkpoint that it leads to."""

import pytest
from tiny_models import build_tiny_model

from fourfold.checkpoint.verify import verify
from fourfold.cli.records import QuantizationRecord
from fourfold.core.manifest import read_manifest
from fourfold.core.records import Frontier


@pytest.fixture
def words(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(2000)))
    return ("--calibration", text, "--samples", 4, "--sequence-tokens", 32, "--device", "cpu")


def test_a_dry_run_shows_and_draws_the_frontier(fourfold, tiny_llama, words, tmp_path):
    out, file = tmp_path / "out", tmp_path / "f.json"
    outcome = fourfold("quantize", tiny_llama, out, "--budget", "5bits", "--dry-run", "--json", file, *words)
    assert outcome.code == 0, outcome.err
    record = Frontier.model_validate_json(file.read_text())
    point = record.points[record.chosen]
    assert point.bits <= 5 and f"{point.bits:.3f}" in outcome.out and "chosen" in outcome.out
    assert record.samples == 4 and record.sequence_tokens == 32
    page = (tmp_path / "out-frontier.html").read_text()
    assert f'<data value="{point.predicted_kl}">' in page and "http-equiv" in page
    order = list(record.groups[0].predicted_kl)  # by size
    assert order[:2] == ["mxfp4", "mxfp6-e2m3"] and order[-1] == "kept"
    for groups in (point.groups for point in record.points):
        assert list(groups) == [form for form in order if form in groups]
    assert page.index('"n">mxfp6-e2m3<') < page.index('"n">kept<')
    assert not out.exists() and not (tmp_path / "out-recipe.yaml").exists()


def test_a_run_writes_what_was_chosen_and_resumes_with_it(fourfold, tiny_llama, words, tmp_path):
    out, file = tmp_path / "out", tmp_path / "q.json"
    outcome = fourfold("quantize", tiny_llama, out, "--budget", "5bits", "--json", file, *words)
    assert outcome.code == 0, outcome.err
    record = QuantizationRecord.model_validate_json(file.read_text())
    assert record.frontier is not None and record.recipe == "mxfp4 within 5bits"
    assert verify(out).passed and "out-recipe.yaml, a recipe" in outcome.out.replace("\n", "")
    first = read_manifest(out)
    again = tmp_path / "again"  # as a run that was killed before its first layer
    (tmp_path / "again-recipe.yaml").write_text((tmp_path / "out-recipe.yaml").read_text())
    outcome = fourfold("quantize", tiny_llama, again, "--budget", "5bits", "--resume", *words)
    assert outcome.code == 0, outcome.err
    assert "best mixtures" not in outcome.out  # what was chosen is not measured again
    second = read_manifest(again)
    assert first is not None and second is not None and first.sha256 == second.sha256
    assert first.recipe == second.recipe and first.recipe is not None and len(first.recipe["rules"]) > 1


def test_a_choice_made_for_something_else_is_refused(fourfold, tiny_llama, words, tmp_path):
    """What is left of another run beside OUT is neither used in silence nor overwritten."""
    out = tmp_path / "out"
    assert fourfold("quantize", tiny_llama, out, "--budget", "5bits", *words).code == 0
    out.rename(tmp_path / "out.partial")
    chosen = (tmp_path / "out-recipe.yaml").read_bytes()
    other = build_tiny_model(tmp_path / "other", seed=9)
    for source, budget, changed, said in (
        (tiny_llama, "5bits", (), "Continue it with --resume"),
        (other, "5bits", ("--resume",), "chosen with another source"),
        (tiny_llama, "6bits", ("--resume",), "chosen with another budget: 5bits then, 6bits now"),
        (tiny_llama, "5bits", ("--resume", "--recipe", "mxfp8"), "chosen with another recipe"),
        (tiny_llama, "5bits", ("--resume", "--seed", 1), "chosen with another calibration_seed: 0 then"),
    ):
        outcome = fourfold("quantize", source, out, "--budget", budget, *words, *changed)
        assert outcome.code == 2 and said in outcome.err, outcome.err
        assert "best mixtures" not in outcome.out
    assert (tmp_path / "out-recipe.yaml").read_bytes() == chosen
    outcome = fourfold("quantize", tiny_llama, out, "--budget", "5bits", *words, "--resume")
    assert outcome.code == 0 and verify(out).passed, outcome.err
    outcome = fourfold("quantize", tiny_llama, out, "--budget", "5bits", *words)
    assert outcome.code == 2 and "exists already" in outcome.err and "best mixtures" not in outcome.out


def test_what_was_measured_is_kept_when_the_page_cannot_be_drawn(fourfold, tiny_llama, words, tmp_path):
    (tmp_path / "out-frontier.html").mkdir()
    outcome = fourfold("quantize", tiny_llama, tmp_path / "out", "--budget", "5bits", *words)
    assert outcome.code == 1 and "out-frontier.html" in outcome.err
    outcome = fourfold("quantize", tiny_llama, tmp_path / "out", "--budget", "5bits", "--resume", *words)
    assert outcome.code == 0 and "best mixtures" not in outcome.out


@pytest.mark.parametrize("budget, said", [("4bits", "cannot be kept"), ("some", "not understood")])
def test_budgets_that_make_no_sense_are_refused(fourfold, tiny_llama, words, tmp_path, budget, said):
    outcome = fourfold("quantize", tiny_llama, tmp_path / "out", "--budget", budget, *words)
    assert outcome.code == 2 and said in outcome.err
    assert not list(tmp_path.glob("out*"))
