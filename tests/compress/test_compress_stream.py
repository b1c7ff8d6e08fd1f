"""Streaming: order, the bound on what is in work at once, errors in their turn, fused tensors read once."""

import threading
import weakref
from dataclasses import replace

import pytest
import torch
from compress_models import build_moe

from fourfold.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from fourfold.compress import load_recipe
from fourfold.compress.model import Entry, Model
from fourfold.compress.resolve import resolve
from fourfold.compress.stream import AHEAD, BUDGET_BYTES, stream
from fourfold.core.quantization import Quantization

MB = 2**20


class Gauge:
    """Counts the bytes of tensors that were begun and not yet handed out."""

    def __init__(self):
        self.now, self.most, self.tensors, self.most_tensors = 0, 0, 0, 0
        self.lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.now += nbytes
            self.tensors += 1 if nbytes > 0 else -1
            self.most, self.most_tensors = max(self.most, self.now), max(self.most_tensors, self.tensors)


def model_of(sizes: list[int], gauge: Gauge) -> Model:
    def entry(index: int, nbytes: int) -> Entry:
        def load() -> torch.Tensor:
            gauge.add(nbytes)
            return torch.tensor([index])

        info = TensorInfo(str(index), (nbytes // 2,), torch.bfloat16, None, nbytes)
        return Entry(info, load, info)

    return Model({}, {str(i): entry(i, size) for i, size in enumerate(sizes)}, Quantization())


@pytest.mark.parametrize(
    ("sizes", "bound"),
    [
        ([MB] * 40, 2 * AHEAD * MB),
        ([60 * MB] * 6, 60 * MB),
        ([40 * MB] * 6, 80 * MB),
        ([MB, 500 * MB, MB, 300 * MB, 300 * MB, MB, MB], 500 * MB),
    ],
)
def test_what_is_in_work_stays_within_the_budget_or_one_tensor(sizes, bound):
    gauge = Gauge()
    model = model_of(sizes, gauge)
    order = []
    for name, value in stream(model, list(model), threads=2):
        order.append(int(value))
        assert int(name) == order[-1]
        gauge.add(-sizes[order[-1]])
    assert order == list(range(len(sizes)))
    assert gauge.most <= bound <= max(BUDGET_BYTES, *sizes)
    assert gauge.most_tensors <= 2 * AHEAD


def test_an_error_comes_in_its_turn_and_stops_the_work():
    gauge = Gauge()
    model = model_of([MB] * 30, gauge)

    def fail() -> torch.Tensor:
        raise ValueError("this one")

    model = model.with_entries({"5": replace(model.entries["5"], load=fail)})
    seen = []
    with pytest.raises(ValueError, match="this one"):
        for name, _ in stream(model, list(model), threads=2):
            seen.append(name)
            gauge.add(-MB)
    assert seen == ["0", "1", "2", "3", "4"]
    assert gauge.most_tensors <= 2 * AHEAD


def test_the_caller_keeps_its_torch_threads():
    before = torch.get_num_threads()
    model = model_of([MB] * 4, Gauge())
    assert len(list(stream(model, list(model), threads=2))) == 4
    assert torch.get_num_threads() == before


def test_a_fused_tensor_is_read_once_for_all_its_experts(tmp_path, monkeypatch):
    source = build_moe(tmp_path / "source", "gpt_oss")
    reads: list[str] = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, name: reads.append(name) or load(self, name))
    model = resolve(open_checkpoint(source), load_recipe("mxfp4")).model
    assert len(list(stream(model, list(model), threads=2))) == len(model)
    fused = [name for name in reads if "gate_up_proj" in name or "down_proj" in name]
    assert len(fused) == len(set(fused)) == 4


def test_a_fused_tensor_is_let_go_with_its_last_piece(tmp_path, monkeypatch):
    source = build_moe(tmp_path / "source", "gpt_oss")
    held: list[weakref.ref[torch.Tensor]] = []
    load = Checkpoint.load

    def watched(self, name):
        value = load(self, name)
        if "gate_up_proj" in name or "down_proj" in name:
            held.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Checkpoint, "load", watched)
    model = resolve(open_checkpoint(source), load_recipe("mxfp4")).model
    for name in model:
        assert model[name] is not None
    assert len(held) == 4 and all(tensor() is None for tensor in held)
