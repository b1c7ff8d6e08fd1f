"""Products of linear layers that are recalled: fewer are computed, and no bit is another."""

import pytest
import torch
from layer_at_work import build_model, recipe_of, tokens
from tiny_models import build_architecture
from torch.nn import functional as F

from fourfold.compress import quantize
from fourfold.compress.calibrated import loop, recall
from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.recall import Recall


@pytest.fixture
def products(monkeypatch):
    """Of every product that is computed, how many numbers it has."""
    counted, of = [], recall.Product.of
    monkeypatch.setattr(recall.Product, "of", lambda linear, x: counted.append(x.numel()) or of(linear, x))
    return counted


def linear_with(held):
    linear = CalibratedLinear(8, 4)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    linear.recall = held
    return linear.requires_grad_(False)


def test_an_equal_input_to_the_same_weight_is_computed_once(products):
    held, x = Recall(10**6), torch.randn(3, 8)
    linear, other = linear_with(held), linear_with(held)
    first = linear(x)
    assert torch.equal(linear(x.clone()), first) and len(products) == 1
    assert torch.equal(other(x), F.linear(x, other.weight, other.bias)) and len(products) == 2
    held.batch = 1
    linear(x)
    assert len(products) == 3


def test_what_has_changed_since_is_computed_anew(products):
    x, y = torch.randn(3, 8), torch.randn(3, 8)

    def found_after(change):
        held = Recall(10**6)
        linear, given = linear_with(held), x.clone()
        change(held, linear, given, linear(given))
        assert torch.equal(linear(given), F.linear(given, linear.weight, linear.bias))

    def another_weight(held, linear, given, out):
        linear.weight.data = linear.weight.data + 1

    def rounded_in_place(held, linear, given, out):
        linear.weight.data.round_()
        held.forget(linear)

    changes = [another_weight, rounded_in_place]
    changes += [lambda _, linear, given, out: given.copy_(y), lambda _, linear, given, out: out.add_(1)]
    for change in changes:
        found_after(change)
    assert len(products) == 2 * len(changes)


def test_there_is_room_for_so_much_and_for_more_when_some_is_forgotten(products):
    x = torch.randn(3, 8)
    held = Recall(x.nbytes + 3 * 4 * 4)
    first, second = linear_with(held), linear_with(held)
    for linear in (first, second, first, second):
        linear(x)
    assert len(products) == 3
    held.forget(first)
    for linear in (second, second):
        linear(x)
    assert len(products) == 4


@pytest.mark.parametrize(
    ("model_type", "asymmetry", "share"),
    [("llama", 0.25, 0.4), ("llama", 0.0, 0.5), ("qwen3_moe", 0.25, 0.76), ("qwen3_5_text", 0.25, 0.39)],
)
def test_gptq_computes_less_and_every_byte_stays(
    tmp_path, monkeypatch, products, model_type, asymmetry, share
):
    build = build_model if model_type == "llama" else build_architecture
    model = build(tmp_path / "model", **({} if model_type == "llama" else {"model_type": model_type}))
    monkeypatch.setitem(loop.TOKENS_PER_BATCH, "cpu", 2 * 4)
    recipe = recipe_of({"gptq": {"asymmetry": asymmetry}})
    counts, files = [], []
    for name, answers in (("recalled", recall.Product.answers), ("anew", lambda *_: False)):
        monkeypatch.setattr(recall.Product, "answers", answers)
        products.clear()
        quantize(model, tmp_path / name, recipe, calibration=tokens(4, 4))
        counts.append(sum(products))
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert counts[0] < share * counts[1], counts
