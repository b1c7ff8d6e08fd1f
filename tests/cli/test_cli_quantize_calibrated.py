"""``fourfold quantize`` with calibration: from a file, from the model itself, and what it refuses."""

import json

import pytest
import torch
from tiny_models import build_tiny_model

from fourfold.cli.authors import EngineAuthor, author_for
from fourfold.cli.records import QuantizationRecord
from fourfold.compress.calibrated.author import draw
from fourfold.core.manifest import read_manifest

RECIPE = "name: own\nrules: [{weight: mxfp4}]\npasses: [gptq]\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE)
    return path


def test_a_text_file_decides_with_its_seed(fourfold, tiny_llama, recipe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(2000)))
    hashes = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ("--samples", 4, "--sequence-tokens", 32, "--seed", seed, "--json", tmp_path / "q.json")
        outcome = fourfold(
            "quantize", tiny_llama, tmp_path / name, "--recipe", recipe, "--calibration", text, *words
        )
        assert outcome.code == 0, outcome.err
        assert "4 sequences of 32 tokens, text.txt" in outcome.out
        record = QuantizationRecord.model_validate_json((tmp_path / "q.json").read_text())
        manifest = read_manifest(tmp_path / name)
        assert manifest is not None and manifest.calibration == record.calibration
        assert record.device == "cpu" and record.calibration is not None
        hashes[name] = record.calibration["sha256"], manifest.sha256["model.safetensors"]
    assert hashes["a"] == hashes["b"]
    assert hashes["a"][0] != hashes["c"][0] and hashes["a"][1] != hashes["c"][1]


def test_without_a_text_the_model_writes_it(fourfold, tiny_llama, recipe, tmp_path):
    words = ("--recipe", recipe, "--samples", 3, "--sequence-tokens", 16)
    outcome = fourfold("quantize", tiny_llama, tmp_path / "out", *words)
    assert outcome.code == 0, outcome.err
    assert "written by the model itself" in outcome.out


def test_a_sequence_follows_from_its_number_and_the_seed(tiny_llama):
    """Whatever is written beside it: so pieces can be written in any order, and again."""
    whole = EngineAuthor(str(tiny_llama), 5, 24, 7).write(0, 5)
    assert whole.shape == (5, 24)
    assert EngineAuthor(str(tiny_llama), 5, 24, 7).write(3, 2).tolist() == whole[3:].tolist()
    assert EngineAuthor(str(tiny_llama), 5, 24, 8).write(0, 5).tolist() != whole.tolist()
    assert len({tuple(row) for row in whole.tolist()}) == 5


def test_a_model_that_the_engine_does_not_know_writes_as_well(tmp_path):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    source = build_tiny_model(tmp_path / "mixtral", "mixtral", num_hidden_layers=1, **sizes)
    whole = author_for(str(source), 4, 20, 7, "cpu")(0, 4)
    assert whole.shape == (4, 20) and whole.min() >= 0 and whole.max() < 256
    assert author_for(str(source), 4, 20, 7, "cpu")(0, 4).tolist() == whole.tolist()
    assert len({tuple(row) for row in whole.tolist()}) == 4


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()[None]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(logits, [generator]) for _ in range(4000)]).bincount(minlength=4) / 4000
    assert drawn[3] == 0
    assert (drawn[:3] - logits[0, :3].exp()).abs().max() < 0.03


def test_a_tokenizer_of_another_model_is_noticed(fourfold, recipe, tmp_path):
    source, text = build_tiny_model(tmp_path / "source", vocab_size=70), tmp_path / "text.txt"
    text.write_text("xyz" * 100)
    outcome = fourfold(
        "quantize",
        source,
        tmp_path / "out",
        "--recipe",
        recipe,
        "--calibration",
        text,
        "--samples",
        2,
        "--sequence-tokens",
        8,
    )
    assert outcome.code == 2 and "embeddings for 70 only" in outcome.err


def test_what_makes_no_sense_is_refused_before_the_work(fourfold, tiny_llama, recipe, tmp_path):
    text, long = tmp_path / "text.txt", tmp_path / "long.txt"
    text.write_text("short")
    long.write_text("a long day " * 300)
    out = tmp_path / "out"
    own = ("quantize", tiny_llama, out, "--recipe", recipe)
    for words, told in (
        (("quantize", tiny_llama, out, "--calibration", text), "looks at no activations"),
        ((*own, "--calibration", text), "has 5 tokens, but 512 sequences of 512 need 262144"),
        ((*own, "--calibration", tmp_path / "none.txt"), "no calibration file"),
        ((*own, "--device", "tpu"), "choose cpu or cuda"),
        ((*own, "--calibration", long, "--samples", 4, "--workers", 2), "inputs: original"),
        ((*own, "--sequence-tokens", 4096), "512 positions"),
    ):
        outcome = fourfold(*words)
        assert outcome.code == 2 and told in outcome.err, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt", "own.yaml", "text.txt"]


def test_a_resume_with_other_calibration_names_the_field(fourfold, tiny_llama, recipe, tmp_path):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("all work and no play " * 100)
    other.write_text("makes Jack a dull boy " * 100)
    words = ["quantize", tiny_llama, tmp_path / "out", "--recipe", recipe, "--resume", "--calibration"]
    size = ["--samples", 4, "--sequence-tokens", 32]
    (tmp_path / "out.partial").mkdir()
    assert fourfold(*words, text, *size).code == 0
    # an interrupted run is one whose folder has not got its name
    manifest = json.loads((tmp_path / "out" / "fourfold.json").read_text())
    (tmp_path / "out").rename(tmp_path / "out.partial")
    assert manifest["fingerprint"]["calibration_samples"] == "4"
    for changed, field in (
        ([other, *size], "calibration_sha256"),
        ([text, "--samples", 5, "--sequence-tokens", 32], "calibration_samples"),
        ([text, *size, "--seed", 1], "calibration_seed"),
    ):
        outcome = fourfold(*words, *changed)
        assert outcome.code == 2 and f"another {field}:" in outcome.err
    assert fourfold(*words, text, *size).code == 0
