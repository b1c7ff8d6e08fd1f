"""Memory that is freed between layers stays with the process, and is given back after them."""

import platform
import resource
import sys
from pathlib import Path

import pytest
import torch

from fourfold.compress.calibrated.memory import memory_kept

PAGES = (24 << 20) // resource.getpagesize()

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's malloc is asked"
)


def pages_taken(times: int = 8) -> int:
    """How many pages the system has to clear for tensors of 24 MiB, two at a time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        tensors = [torch.ones(6 << 20) for _ in range(2)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Pages in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_what_is_freed_is_used_again_and_in_the_end_given_back():
    outside = resident()
    with memory_kept():
        assert pages_taken() < 5 * PAGES  # of 16
        inside = resident()
    assert inside > outside + 1.5 * PAGES
    assert resident() < outside + 0.5 * PAGES


def test_an_error_inside_gives_memory_back_as_well():
    outside = resident()
    with pytest.raises(MemoryError), memory_kept():
        pages_taken()
        raise MemoryError
    assert resident() < outside + 0.5 * PAGES
