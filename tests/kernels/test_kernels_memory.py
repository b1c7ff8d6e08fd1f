"""Memory of large pages: aligned, its own, and gone with its last tensor."""

import gc
import re
import weakref
from pathlib import Path

import pytest
import torch

from fourfold.kernels.cpu import memory
from fourfold.kernels.cpu.memory import large_pages


def test_tensors_are_aligned_zeroed_and_apart():
    tensors = [large_pages(3, 7 * i) for i in range(1, 20)] + [large_pages(memory.CHUNK // 2)]
    for value, tensor in enumerate(tensors):
        assert tensor.data_ptr() % memory.ALIGNMENT == 0 and not tensor.any()
        tensor.fill_(value)
    assert all((tensor == value).all() for value, tensor in enumerate(tensors))
    assert large_pages(0, 5).shape == (0, 5)


def test_a_chunk_goes_with_its_last_tensor_and_a_full_one_is_followed(monkeypatch):
    monkeypatch.setattr(memory, "_shared", memory._Shared())
    first, second = large_pages(memory.CHUNK // 5), large_pages(memory.CHUNK // 5)
    assert memory._shared.chunk is not None
    chunk = memory._shared.chunk
    assert isinstance(chunk, weakref.ref) and chunk() is not None
    others = [large_pages(memory.CHUNK // 5) for _ in range(4)]
    assert memory._shared.chunk is not chunk
    del first
    gc.collect()
    assert chunk() is not None and torch.equal(second, torch.zeros_like(second))
    del second, others
    gc.collect()
    assert chunk() is None


def mapping_of(address: int) -> str:
    """What Linux says of the mapping that holds ``address``."""
    entries = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for entry in entries[1:]:
        start, end = (int(part, 16) for part in entry.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return entry
    raise AssertionError("no mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without large pages to ask for"
)
@pytest.mark.parametrize("count", [1000, memory.CHUNK])
def test_large_pages_are_asked_for_where_they_can_be_had(count):
    tensor = large_pages(count)
    entry = mapping_of(tensor.data_ptr())
    assert entry.split()[1] == "rw-p", "shared memory has its own rules"
    assert " hg" in entry
