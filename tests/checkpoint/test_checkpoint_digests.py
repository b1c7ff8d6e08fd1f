"""What was written is compared with what was in memory: at export, and by verify at any time."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import projections, quantize_folder
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_tiny_model

from fourfold.checkpoint.convert import convert
from fourfold.checkpoint.dialects.compressed_tensors import CompressedTensors
from fourfold.checkpoint.digests import DIGESTS_NAME, digest, read_digests
from fourfold.checkpoint.storage.writer import SafetensorsWriter
from fourfold.checkpoint.verify import verify
from fourfold.core.durable import sha256_of
from fourfold.core.errors import FourfoldError
from fourfold.formats import get_format


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return build_tiny_model(
        tmp_path_factory.mktemp("models") / "moe", "qwen3_moe", num_hidden_layers=1, **sizes
    )


@pytest.fixture
def swapped(monkeypatch):
    """A writer that puts experts 0 and 1 at each other's places, as a wrong name or offset would."""
    write, other = SafetensorsWriter.write, {"0": "1", "1": "0"}

    def confused(self, name, tensor):
        write(self, re.sub(r"(?<=\.experts\.)[01](?=\.)", lambda number: other[number[0]], name), tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", confused)
    return monkeypatch


def test_experts_that_changed_places_are_caught_at_export(moe, swapped, tmp_path):
    def make(**options) -> Path:
        return quantize_folder(moe, tmp_path / "out", "compressed-tensors", projections(), **options)

    with pytest.raises(FourfoldError, match=r"6 tensors .* not what was in memory .*mlp\.experts\.[01]\."):
        make()
    assert not (tmp_path / "out").exists()
    swapped.undo()
    # what was wrong is not taken for done
    assert verify(make(resume=True)).passed


def test_and_by_verify_later(moe, swapped, tmp_path):
    """The same damage in a folder whose hashes all agree, as a tool that rewrote it would leave it."""
    swapped.setattr("fourfold.checkpoint.writer.differing", lambda *_: [])
    out = quantize_folder(moe, tmp_path / "out", "compressed-tensors", projections())
    swapped.undo()
    report = verify(out)
    assert {p.split()[0].split(".experts.")[1] for p in report.problems} == {
        f"{expert}.{projection}_proj.weight" for expert in "01" for projection in ("gate", "up", "down")
    }
    assert all("not the tensor that was in memory" in problem for problem in report.problems)


def without_activations(settings):
    settings["config_groups"]["group_0"]["input_activations"] = None
    return settings


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (without_activations, r"model\.layers\.0\.mlp\.\w+_proj"),
        (lambda settings: settings | {"kv_cache_scheme": None}, "the KV cache"),
    ],
)
def test_a_scheme_that_is_read_as_another_is_caught_at_export(
    tiny_llama, tmp_path, monkeypatch, changed, named
):
    """Every byte of every tensor is right, and readers would compute something else with them."""
    say = CompressedTensors.quantization_config
    monkeypatch.setattr(CompressedTensors, "quantization_config", lambda *args: changed(say(*args)))
    with pytest.raises(FourfoldError, match=f"the scheme of {named} is not"):
        quantize_folder(
            tiny_llama,
            tmp_path / "out",
            "compressed-tensors",
            projections("mxfp4", "mxfp8-e4m3"),
            kv_cache="fp8",
        )
    assert not (tmp_path / "out").exists()


def test_a_kv_scale_that_is_read_as_another_number_is_caught_at_export(tiny_llama, tmp_path, monkeypatch):
    write = SafetensorsWriter.write

    def twice(self, name, tensor):
        write(self, name, tensor * 2 if name.endswith("1.self_attn.v_scale") else tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", twice)
    with pytest.raises(FourfoldError, match=r"the scheme of model\.layers\.1\.self_attn\.v_proj is not"):
        quantize_folder(tiny_llama, tmp_path / "out", "compressed-tensors", projections(), kv_cache="fp8")


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_digests_hold_in_every_dialect(tiny_llama, tmp_path, dialect):
    other = {"compressed-tensors": "quark", "quark": "compressed-tensors"}[dialect]
    one = quantize_folder(tiny_llama, tmp_path / "one", dialect, projections())
    convert(one, tmp_path / "two", other)
    first, second = read_digests(one), read_digests(tmp_path / "two")
    assert first is not None and second is not None and first.tensors == second.tensors
    report = verify(one)
    assert report.passed and report.tensors_compared == report.tensors == 21


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_scale_that_is_stored_as_its_reciprocal_keeps_its_digest(scale):
    value = get_format("nvfp4").quantize(torch.linspace(-3, 3, 32).view(2, 16))
    there = torch.tensor(scale)
    back = 1 / (1 / there)
    digests = {digest(type(value)("nvfp4", value.blocks, value.scales, None, s)) for s in (there, back)}
    assert len(digests) == 1


def test_a_digest_tells_kind_shape_and_bytes():
    x = torch.arange(64.0).view(2, 32)
    block = get_format("mxfp4").quantize(x)
    other = get_format("mxfp4").quantize(x.flip(0))
    values = [x, x.view(4, 16), x.view(torch.int32), x + 1, block, other]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(x.T.contiguous().T) == digest(x)


def test_a_damaged_list_of_digests_is_a_problem(tiny_llama, tmp_path):
    out = quantize_folder(tiny_llama, tmp_path / "out", "compressed-tensors", projections())
    path = out / DIGESTS_NAME
    damaged = json.loads(path.read_text())
    file, tensors = next(iter(damaged["files"].items()))
    damaged["files"][file] = tensors | {"model.layers.7.extra.weight": "00"}
    path.write_text(json.dumps(damaged))
    manifest = json.loads((out / "fourfold.json").read_text())
    manifest["sha256"][DIGESTS_NAME] = sha256_of(path)
    (out / "fourfold.json").write_text(json.dumps(manifest))
    assert verify(out).problems == [
        f"model.layers.7.extra.weight is named in {DIGESTS_NAME} but not to be found. Copy the folder again."
    ]
    path.write_text("{")
    assert any("cannot be understood" in problem for problem in verify(out).problems)
