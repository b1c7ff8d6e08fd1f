"""One safetensors file written tensor by tensor, equal byte for byte to what the safetensors library writes.

The library sorts tensors by dtype (widest first) and then by name, which keeps every tensor aligned. Sizes
are known beforehand, so the header goes first and each tensor goes to its place whenever it comes. The file
is hashed afterwards from the page cache: one more read, in exchange for a free order of writing.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from fourfold.checkpoint.storage.header import DTYPES, PlannedTensor, build_header
from fourfold.core.durable import file_failure, sha256_of, sync_folder, writing
from fourfold.core.errors import FourfoldError

METADATA = {"format": "pt"}  # transformers refuses a file whose metadata does not say this
MAX_WRITE_BYTES = 1 << 30

_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


def canonical_order(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """The order of the safetensors library: dtype from wide to narrow, then name."""
    return sorted(tensors, key=lambda t: (-_DTYPE_RANK[t.dtype], t.name.encode()))


class SafetensorsWriter:
    """Context manager that writes ``path``; the file appears under its name only when every tensor is in it.

    ``on_done`` gets the sha256 once the file is durable. Raises FourfoldError when the disk is full; the
    unfinished file is then removed.
    """

    def __init__(self, path: Path, tensors: list[PlannedTensor], on_done: Callable[[str], None]):
        self.path, self.on_done = path, on_done
        self._temporary = path.with_name(path.name + ".tmp")
        ordered = canonical_order(tensors)
        self._header = build_header(ordered, METADATA)
        self._places: dict[str, tuple[PlannedTensor, int]] = {}
        position = len(self._header)
        for tensor in ordered:
            self._places[tensor.name] = (tensor, position)
            position += tensor.nbytes
        self.nbytes = position
        self._handle = -1

    def __enter__(self) -> Self:
        try:
            self._handle = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            _reserve(self._handle, self.nbytes)
            _write_at(self._handle, memoryview(self._header), 0)
        except OSError as error:
            self._discard()
            raise self._failed(error) from error
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put ``tensor`` at its place.

        Raises FourfoldError when it is not what was planned, or comes twice.
        """
        if name not in self._places:
            raise FourfoldError(
                f"Tensor '{name}' is not planned for {self.path.name}, or was already written."
            )
        plan, position = self._places.pop(name)
        if tensor.dtype != plan.dtype or tuple(tensor.shape) != plan.shape:
            raise FourfoldError(
                f"Tensor '{name}' came as {tensor.dtype} {list(tensor.shape)}, but {plan.dtype} "
                f"{list(plan.shape)} was planned for {self.path.name}."
            )
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        try:
            _write_at(self._handle, raw.numpy().data, position)
        except OSError as error:
            raise self._failed(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        if self._places:
            self._discard()
            raise FourfoldError(
                f"{self.path.name} lacks planned tensors: {', '.join(sorted(self._places)[:5])}."
            )
        try:
            os.fsync(self._handle)
        except OSError as failure:
            self._discard()
            raise self._failed(failure) from failure
        os.close(self._handle)
        with writing(self.path):
            digest = sha256_of(self._temporary)
            self._temporary.replace(self.path)
            sync_folder(self.path.parent)
        self.on_done(digest)

    def _discard(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._temporary.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> FourfoldError:
        return file_failure(error, f"{self.path} ({self.nbytes} bytes)")


def _reserve(handle: int, nbytes: int) -> None:
    # a full disk should be noticed before the work on this shard, not after it
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _write_at(handle: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + MAX_WRITE_BYTES], position + done)
