"""The comparison in benchmarks/quantize: it must see a difference, and none in the sign of zero."""

import sys
from pathlib import Path

import pytest
from compress_models import change_tensor

from fourfold.compress import quantize

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "quantize"
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def outputs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import outputs

    yield outputs
    sys.modules.pop("outputs")


@pytest.fixture
def two(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "a", dialect="compressed-tensors")
    quantize(tiny_llama, tmp_path / "b", dialect="quark")
    return tmp_path / "a", tmp_path / "b"


def test_the_two_dialects_are_equal(outputs, two):
    a, b = map(outputs.read, two)
    assert outputs.differences(a, b) == []
    assert f"{LAYER}:codes" in a and f"{LAYER}:scales" in a and "model.norm.weight" in a


@pytest.mark.parametrize(
    ("name", "flip", "part"),
    [(f"{LAYER}.weight", 0x01, f"{LAYER}:codes"), (f"{LAYER}.weight_scale", 0x01, f"{LAYER}:scales")],
)
def test_one_bit_is_seen(outputs, two, name, flip, part):
    change_tensor(two[1], name, lambda tensor: tensor ^ flip)
    assert outputs.differences(*map(outputs.read, two)) == [part]


def test_the_sign_of_zero_is_not(outputs, two):
    def negate_zeros(codes):
        low, high = codes & 15, codes >> 4
        low, high = low.where(low != 0, 8), high.where(high != 0, 8)
        return low | (high << 4)

    before = outputs.read(two[1])[f"{LAYER}:codes"]
    assert ((before & 15) == 0).any()
    change_tensor(two[1], f"{LAYER}.weight", negate_zeros)
    assert outputs.differences(*map(outputs.read, two)) == []
