"""Memory that layers use one after the other, and what to do when it ends inside one: the same again in
smaller batches, or a clear word.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fourfold.core.errors import FourfoldError

# what torch says in a plain RuntimeError: where the system has no more, CUDA itself, or one of its libraries
WORDS = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = {MMAP_THRESHOLD: 64 << 20, TRIM_THRESHOLD: 512 << 20}
USUAL = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}  # glibc's own once 32 MiB have been freed


@contextmanager
def memory_kept() -> Iterator[None]:
    """Tensors of up to 64 MiB that are freed meanwhile leave their memory, up to 512 MiB, to the next.

    glibc would give it back at once, and the system clear it anew page by page: 0.3 of 2.2 s for two layers
    of hidden size 1024. Nothing happens where malloc is another.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    for option, value in KEPT.items():
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in USUAL.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that there is no memory left, on a GPU or not."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in WORDS
    )


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def memory_told(device: torch.device) -> Iterator[None]:
    """A calibrated run on ``device``: where memory ends outside a layer, that is said in a FourfoldError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        beside = "What is needed beside the layers (embeddings, inputs, what the whole model is run for)"
        raise no_room(f"{beside} does not fit into the memory of {device}", device, str(error)) from error


def no_room(what: str, device: torch.device, reason: str) -> FourfoldError:
    """The error when nothing can be made smaller; ``what`` says what does not fit where."""
    elsewhere = "" if device.type == "cpu" else ", or with --device cpu"
    return FourfoldError(
        f"{what} ({' '.join(reason.split())[:200]}). Finished layers are kept: "
        "end what else uses this memory, and run the same command with --resume; or start anew with a "
        f"smaller --sequence-tokens or --samples{elsewhere}."
    )
