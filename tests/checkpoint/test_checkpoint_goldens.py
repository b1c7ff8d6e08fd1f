"""What we write equals what amd-quark and llm-compressor write for the same weights."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import GOLDENS, projections, quantize_folder
from safetensors.torch import load_file

from fourfold.checkpoint import open_checkpoint
from fourfold.checkpoint.block_dialect import OWN_KEY
from fourfold.formats import BlockTensor

DIALECTS = {"quark": "quark", "llm-compressor": "compressed-tensors"}
EXACT = [("llm-compressor", "mxfp4"), ("quark", "mxfp4"), ("quark", "mxfp6-e2m3"), ("quark", "mxfp6-e3m2")]
ACTIVATIONS = {"a4": "mxfp4", "a6": "mxfp6-e2m3", "a8": "mxfp8-e4m3"}


def ours(out: Path, peer: str, name: str) -> Path:
    activation = ACTIVATIONS.get(name.rpartition("-")[2])
    weight = name.rpartition("-")[0] if name.endswith(("-a4", "-a6", "-a8", "-kv8")) else name
    kv_cache = "fp8" if name.endswith("-kv8") else None
    scheme = projections(weight, activation)
    return quantize_folder(GOLDENS / "source", out, DIALECTS[peer], scheme, kv_cache=kv_cache)


@pytest.mark.parametrize(("peer", "name"), EXACT)
def test_every_tensor_equals_the_peers(tmp_path, peer, name):
    theirs = load_file(GOLDENS / f"{peer}-{name}" / "model.safetensors")
    mine = load_file(ours(tmp_path / "out", peer, name) / "model.safetensors")
    assert set(mine) == set(theirs)
    for tensor, expected in theirs.items():
        assert mine[tensor].dtype == expected.dtype and mine[tensor].shape == expected.shape
        if tensor.endswith("weight_scale"):
            same = mine[tensor] == expected
            # a block of zeros has no right scale: Quark writes 1, llm-compressor and we 0
            zeros = rows_of_zeros(tensor)
            assert same[~zeros].all() and (mine[tensor][zeros] == 0).all()
            assert peer == "quark" or same.all()
    opened, peers = open_checkpoint(tmp_path / "out"), open_checkpoint_of(peer, name, tmp_path)
    for weight in opened.names():
        a, b = opened.load(weight), peers.load(weight)
        assert type(a) is type(b)
        if isinstance(a, BlockTensor) and isinstance(b, BlockTensor):
            assert codes_differ_in_zeros_sign_only(a, b)
        else:
            assert torch.equal(a, b)


def rows_of_zeros(scale_name: str) -> torch.Tensor:
    weights = load_file(GOLDENS / "source" / "model.safetensors")[scale_name.removesuffix("_scale")]
    return weights.unflatten(-1, (-1, 32)).abs().amax(-1) == 0


def codes_differ_in_zeros_sign_only(a: BlockTensor, b: BlockTensor) -> bool:
    from fourfold.formats.numbers.pack import unpack

    bits = {"mxfp4": 4, "mxfp6-e2m3": 6, "mxfp6-e3m2": 6}[a.format]
    sign = 1 << (bits - 1)
    codes, expected = unpack(a.blocks, bits), unpack(b.blocks, bits)
    differ = codes != expected
    return bool(
        ((codes[differ] & ~sign & 0xFF) == 0).all() and ((expected[differ] & ~sign & 0xFF) == 0).all()
    )


def open_checkpoint_of(peer: str, name: str, folder: Path):
    """A golden as the peer left it: its weights and its config.json."""
    made = folder / f"{peer}-{name}-golden"
    made.mkdir()
    config = json.loads((GOLDENS / "source" / "config.json").read_text())
    settings = json.loads((GOLDENS / f"{peer}-{name}" / "quantization_config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (made / "model.safetensors").symlink_to(GOLDENS / f"{peer}-{name}" / "model.safetensors")
    return open_checkpoint(made)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-a4", "mxfp4-a6", "mxfp4-a8", "mxfp4-kv8", "mxfp6-e2m3"])
def test_the_configuration_equals_quarks(tmp_path, name):
    out = ours(tmp_path / "out", "quark", name)
    mine = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs = json.loads((GOLDENS / f"quark-{name}" / "quantization_config.json").read_text())
    assert mine.pop(OWN_KEY) == {"scale_rules": {"global": "even"}}
    assert mine == theirs


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-a4"])
def test_the_configuration_equals_llm_compressors(tmp_path, name):
    out = ours(tmp_path / "out", "llm-compressor", name)
    mine = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs = json.loads((GOLDENS / f"llm-compressor-{name}" / "quantization_config.json").read_text())
    assert mine.pop(OWN_KEY) == {"scale_rules": {"group_0": "even"}}
    assert mine.pop("version") == "0.20.0" and theirs.pop("version") == "0.19.0"
    # theirs lists what it was told to ignore; embeddings are no Linear, so ours does not name them
    assert mine.pop("ignore") == ["lm_head"] and theirs.pop("ignore") == ["lm_head", "model.embed_tokens"]
    (my_group,), (their_group,) = mine.pop("config_groups").values(), theirs.pop("config_groups").values()
    assert my_group == their_group
    assert mine == theirs


@pytest.mark.parametrize(
    ("name", "weight"), [("mxfp8-e4m3", "mxfp8-e4m3"), ("nvfp4", "nvfp4"), ("fp8-channel", "fp8-channel")]
)
def test_what_llm_compressor_wrote_is_read_as_its_library_reads_it(tmp_path, name, weight):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    checkpoint = open_checkpoint_of("llm-compressor", name, tmp_path)
    settings = json.loads((GOLDENS / f"llm-compressor-{name}" / "quantization_config.json").read_text())
    (group,) = settings["config_groups"].values()
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    stored = load_file(GOLDENS / f"llm-compressor-{name}" / "model.safetensors")
    for module, scheme in checkpoint.quantization.layers.items():
        assert scheme.weight == weight
        state = {k.removeprefix(module + "."): v for k, v in stored.items() if k.startswith(module + ".")}
        state = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in state.items()}
        expected = compressor.decompress(state, QuantizationScheme(**group))["weight"].float()
        loaded = checkpoint.load(f"{module}.weight")
        assert isinstance(loaded, BlockTensor)
        # the library multiplies in bfloat16 where we do in float32: 2^-8 is one bfloat16 rounding
        torch.testing.assert_close(loaded.dequantize(), expected, rtol=2**-8, atol=0)
