"""What may be wrong with an input: each time one paragraph that names place and remedy, and no traceback."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def assert_one_paragraph(outcome, code: int, *words: str) -> None:
    """The error is a single paragraph on stderr, begins with the command's name, and holds ``words``."""
    assert outcome.code == code, outcome
    lines = [line for line in outcome.err.splitlines() if line.startswith("fourfold: ")]
    assert len(lines) == 1, outcome.err
    assert outcome.err.rstrip().endswith(lines[0]), "the error is not the last paragraph"
    assert "Traceback" not in outcome.err + outcome.out
    assert len(lines[0]) < 700
    for word in words:
        assert word in lines[0]


def change_config(model: Path, **changes) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_source_that_is_not_there(fourfold, tmp_path):
    assert_one_paragraph(fourfold("quantize", tmp_path / "nowhere", tmp_path / "out"), 2, "nowhere")


def test_a_config_that_is_no_json(fourfold, model, tmp_path):
    (model / "config.json").write_text('{"model_type": "llama",')
    for verb in (["quantize", model, tmp_path / "out"], ["generate", model, "--prompt", "a"]):
        assert_one_paragraph(fourfold(*verb), 1, "config.json")


def test_a_config_that_is_missing(fourfold, model, tmp_path):
    (model / "config.json").unlink()
    assert_one_paragraph(fourfold("quantize", model, tmp_path / "out"), 1, "config.json")


def test_a_shard_that_is_missing(fourfold, model, tmp_path):
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, model / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fourfold("quantize", model, tmp_path / "whole").code == 0
    (model / "model-00002-of-00002.safetensors").unlink()
    outcome = fourfold("quantize", model, tmp_path / "out")
    assert_one_paragraph(outcome, 1, "model-00002-of-00002.safetensors")


def test_weights_of_a_wrong_dtype(fourfold, model, tmp_path):
    tensors = load_file(model / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    assert_one_paragraph(fourfold("quantize", model, tmp_path / "out"), 1, name, "int32")


def test_a_truncated_file(fourfold, model, tmp_path):
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[:-100])
    assert_one_paragraph(fourfold("quantize", model, tmp_path / "out"), 1, WEIGHTS)


def test_a_shape_that_is_no_multiple_of_32(fourfold, model, tmp_path):
    tensors = load_file(model / WEIGHTS)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :80].contiguous()
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    assert_one_paragraph(fourfold("quantize", model, tmp_path / "out"), 1, name, "80", "32")
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_the_engine_does_not_know(fourfold, model, tmp_path):
    change_config(model, model_type="mamba9", architectures=["Mamba9ForCausalLM"])
    outcome = fourfold("generate", model, "--prompt", "a")
    assert_one_paragraph(outcome, 2, "mamba9", "llama", "qwen3")


@pytest.mark.parametrize("words", [["generate", "--prompt", "a"], ["evaluate"]])
def test_a_tokenizer_that_is_missing(fourfold, model, words):
    (model / "tokenizer.json").unlink()
    assert_one_paragraph(fourfold(*words, model), 1, "tokenizer")


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from fourfold.cli.main import main
sys.argv = ["fourfold", *sys.argv[1:]]
main()
"""


@pytest.mark.e2e
def test_a_full_disk(fourfold, model, tmp_path):
    """A process that may write files of 20 kB only meets the error that a full disk gives while writing."""
    words = ["quantize", model, tmp_path / "out"]
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, words)], capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "No room" in result.stderr and "--resume" in result.stderr
    assert not (tmp_path / "out").exists()
    assert fourfold(*words, "--resume").code == 0
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_an_output_below_a_file(fourfold, tiny_llama, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["quantize", tiny_llama, tmp_path / "file" / "out"]
    assert_one_paragraph(fourfold(*words), 1, "file/out", "Not a directory", "rights")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fails_outside_every_room_is_one_paragraph():
    """The last net: nothing in the command expects that its own output cannot be written."""
    code = "import sys; from fourfold.cli.main import main; sys.argv = ['fourfold', '--version']; main()"
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-u", "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "No room for" in result.stderr and "--resume" in result.stderr


def test_an_output_that_is_there(fourfold, tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    assert_one_paragraph(fourfold("quantize", tiny_llama, tmp_path / "out"), 2, "out", "exists")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--recipe", "fp3"], "mxfp4"),
        (["--dialect", "klingon"], "quark"),
        (["--json", f"{__file__}/x.json"], "folder"),
    ],
)
def test_options_that_name_nothing(fourfold, tiny_llama, tmp_path, words, named):
    assert_one_paragraph(fourfold("quantize", tiny_llama, tmp_path / "out", *words), 2, words[1])
    assert named in fourfold("quantize", tiny_llama, tmp_path / "out", *words).err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gate", "kl_divergence=0.1"], "--against"),
        (["--gate", "beauty=1"], "beauty"),
        (["--gate", "perplexity=low"], "number"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--window-tokens", "100000"], "100000"),
    ],
)
def test_evaluate_refuses_what_cannot_be(fourfold, tiny_llama, words, named):
    assert_one_paragraph(fourfold("evaluate", tiny_llama, *words), 2, named)


def test_a_text_that_is_too_short(fourfold, tiny_llama, tmp_path):
    (tmp_path / "short.txt").write_text("Too short to say anything.")
    outcome = fourfold("evaluate", tiny_llama, "--text", tmp_path / "short.txt")
    assert_one_paragraph(outcome, 1, "'short'", "--window-tokens")


def test_an_unknown_verb_is_misuse(fourfold):
    assert fourfold("quantise").code == 2
