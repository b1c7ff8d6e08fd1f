"""Memory for weights, in pages of two megabytes where the system gives them.

Reading weights once a token is bound by memory, and with pages of four kilobytes a good part of the time goes
into finding them: a virtual machine read 35 GB/s from large pages and 18 to 20 from small ones, one thread.
Linux gives large pages to those who ask, and only inside of mappings; so tensors that are smaller share one.
"""

import math
import mmap
import threading
import weakref
from contextlib import suppress

import torch

CHUNK = 32 << 20
ALIGNMENT = 64


class _Shared:
    """The chunk that small tensors come from; it lives as long as any of them does."""

    def __init__(self):
        self.lock = threading.Lock()
        self.chunk: weakref.ref[mmap.mmap] | None = None
        self.used = 0

    def take(self, count: int) -> tuple[mmap.mmap, int]:
        """A chunk and where in it ``count`` bytes are free."""
        with self.lock:
            chunk = self.chunk() if self.chunk is not None else None
            if chunk is None or self.used + count > CHUNK:
                chunk = _mapped(CHUNK)
                self.chunk, self.used = weakref.ref(chunk), 0
            start = self.used
            self.used = -(-(start + count) // ALIGNMENT) * ALIGNMENT
        return chunk, start


_shared = _Shared()


def large_pages(*shape: int) -> torch.Tensor:
    """Zeroed uint8 of ``shape``, its start a multiple of 64 bytes; what is never touched costs nothing."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=torch.uint8)
    chunk, start = (_mapped(count), 0) if count > CHUNK // 4 else _shared.take(count)
    return torch.frombuffer(chunk, dtype=torch.uint8, count=count, offset=start).view(shape)


def _mapped(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    # private: Python's default is shared, which the kernel holds in small pages
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
