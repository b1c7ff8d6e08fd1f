"""One tensor's bytes from a file into torch by pread: memory is that tensor's and nothing stays mapped."""

import os
from pathlib import Path

import torch

from fourfold.checkpoint.storage.header import StoredTensor, broken, short
from fourfold.core.errors import FourfoldError

MAX_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB a call


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The tensor [stored.shape] of stored.dtype. Raises FourfoldError when the file fails or is too short."""
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    read_into(stored.path, stored.begin, raw.numpy().data, stored.name)
    return raw.view(stored.dtype).reshape(stored.shape)


def read_into(path: Path, begin: int, target: memoryview, name: str) -> None:
    """Fill ``target`` with the bytes of ``path`` from ``begin`` on; ``name`` is for the error."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(target):
                count = os.preadv(handle, [target[done : done + MAX_READ_BYTES]], begin + done)
                if count == 0:
                    raise broken(path, f"it ends inside the tensor '{short(name)}'")
                done += count
        finally:
            os.close(handle)
    except OSError as error:
        raise FourfoldError(f"Cannot read '{short(name)}' from {path}: {error.strerror}.") from error
