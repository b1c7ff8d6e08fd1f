"""Opening folders: whole ones, broken ones, and names that are no folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourfold.checkpoint import open_checkpoint
from fourfold.core.errors import FourfoldError, UsageError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(folder) -> Path:
    """The same model in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    write_index(folder, {name: file for file, own in halves.items() for name in own})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def refused(folder: Path) -> str:
    with pytest.raises(FourfoldError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_every_tensor_is_read_as_it_is(layout, request, tiny_llama):
    checkpoint = open_checkpoint(request.getfixturevalue(layout))
    expected = load_file(tiny_llama / "model.safetensors")
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        loaded = checkpoint.load(name)
        assert isinstance(loaded, torch.Tensor) and torch.equal(loaded, tensor)
        info = checkpoint.info(name)
        assert (info.shape, info.dtype, info.format) == (tuple(tensor.shape), tensor.dtype, None)
        assert info.nbytes == tensor.nbytes and (checkpoint.folder / info.shard).is_file()


def test_the_card_tells_size_and_format(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama)
    card = checkpoint.card()
    tensors = load_file(tiny_llama / "model.safetensors").values()
    assert card.name == "tiny-llama" and card.architecture == "LlamaForCausalLM"
    assert card.parameters == sum(t.numel() for t in tensors) and card.weight_format == "bf16"
    assert card.bits_per_weight == 16 and card.size_bytes == 2 * card.parameters
    assert checkpoint.dialect == "plain" and checkpoint.quantization.layers == {}
    assert {path.name for path in checkpoint.tokenizer_files()} == {"tokenizer.json", "tokenizer_config.json"}


def test_an_unknown_tensor_is_named(tiny_llama):
    with pytest.raises(UsageError, match=r"no tensor 'model\.nothing'"):
        open_checkpoint(tiny_llama).load("model.nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ('{"model_type": "llama", "model_type": "x"}', "'model_type' twice"),
        ("[]", "not a JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": "llama", "quantization_config": 3}', "quantization_config that is not an object"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', "the method 'awq'"),
    ],
)
def test_a_broken_config_is_refused(folder, text, expected):
    (folder / "config.json").write_text(text)
    message = refused(folder)
    assert expected in message and str(folder) in message


def test_a_missing_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert "holds no config.json" in refused(folder)


def test_a_broken_manifest_is_refused(folder):
    (folder / "fourfold.json").write_text('{"kind": "something"}')
    assert "fourfold.json cannot be understood (Input should be 'fourfold.checkpoint/1')" in refused(folder)
    (folder / "fourfold.json").write_text('{"kind": "fourf')
    assert "fourfold.json cannot be understood (Invalid JSON: EOF" in refused(folder)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "lacks the shard model-00002-of-00002.safetensors" in refused(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
    weight_map = read_index(sharded)
    name = min(weight_map)
    write_index(sharded, weight_map | {name: "model-00002-of-00002.safetensors"})
    assert f"'{name}' into model-00002-of-00002.safetensors, which does not hold it" in refused(sharded)


OUTSIDE = ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", 7, "x\\y", "a\0b"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_an_index_cannot_lead_out_of_the_folder(sharded, path):
    weight_map = read_index(sharded)
    write_index(sharded, weight_map | {min(weight_map): path})
    message = refused(sharded)
    assert "not a file in its folder" in message or "not a safetensors file" in message


def test_an_index_names_safetensors_only(sharded):
    write_index(sharded, read_index(sharded) | {"x": "pytorch_model.bin"})
    assert "not a safetensors file" in refused(sharded)


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_an_index_without_a_map_is_refused(sharded, weight_map):
    write_index(sharded, weight_map)
    assert "weight_map is not a map" in refused(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    twice = load_file(sharded / "model-00001-of-00002.safetensors")
    second = load_file(sharded / "model-00002-of-00002.safetensors")
    name = next(iter(twice))
    save_file(second | {name: twice[name]}, sharded / "model-00002-of-00002.safetensors")
    assert f"'{name}' is also in model-00001" in refused(sharded)


def test_shards_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    assert "2 safetensors files but no" in refused(sharded)


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle runs code" in refused(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "holds no *.safetensors" in refused(folder)


def test_a_truncated_shard_is_refused(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    assert "100 bytes too early" in refused(folder)


def test_a_shard_cut_after_opening_is_an_error_not_a_crash(folder):
    checkpoint = open_checkpoint(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(FourfoldError, match="ends inside the tensor"):
        checkpoint.load(checkpoint.names()[-1])


def test_a_missing_tokenizer_is_an_error_with_the_remedy(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(FourfoldError, match="holds no tokenizer"):
        open_checkpoint(folder).write_tokenizer(tmp_path)


def test_neither_path_nor_hub_name(tmp_path):
    with pytest.raises(UsageError, match="neither a folder nor a file"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(UsageError, match="neither"):
        open_checkpoint("mistyped")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"not a \*\.gguf"):
        open_checkpoint(tmp_path / "x.bin")


@pytest.fixture
def cached_hub_model(monkeypatch, tmp_path, sharded) -> Path:
    """A snapshot of two shards in a hub cache, on a machine without a network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "cache" / "models--owner--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(sharded, repository / "snapshots" / commit))


def test_a_whole_snapshot_in_the_cache_is_taken(cached_hub_model, sharded):
    opened = open_checkpoint("owner/model")
    assert opened.names() == open_checkpoint(sharded).names() and opened.folder is not None
    (cached_hub_model / "tokenizer.json").unlink()
    assert open_checkpoint("owner/model").names() == opened.names()


@pytest.mark.parametrize(
    "missing",
    [["model-00002-of-00002.safetensors"], ["model-00002-of-00002.safetensors", INDEX], ["config.json"]],
)
def test_half_a_snapshot_in_the_cache_is_not_taken_for_whole(cached_hub_model, missing):
    for name in missing:
        (cached_hub_model / name).unlink()
    # it asks the hub for the rest, and there is no network
    assert "the hub could not deliver it" in refused(Path("owner/model"))


def test_a_hub_model_that_cannot_be_had_says_so(monkeypatch, tmp_path):
    # the endpoint is this machine with no server, so the real client fails at once and without the network
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FourfoldError, match="the hub could not deliver it") as caught:
        open_checkpoint("nobody/has-this-model")
    assert "log in" in str(caught.value) and "\n" not in str(caught.value)
