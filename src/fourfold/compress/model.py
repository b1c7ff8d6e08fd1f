"""The model that passes work on: a lazy mapping of logical names to tensors over a checkpoint.

Nothing is read until a name is asked for, and nothing is kept, so that a pass that looks at one tensor at a
time streams. The one exception is a fused expert tensor, which is held until its last piece is out: reading
it anew for each of 128 experts would cost more than holding it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch

from fourfold.checkpoint import Checkpoint, TensorInfo
from fourfold.compress.experts import Piece
from fourfold.core.quantization import Quantization
from fourfold.formats import BlockTensor, get_format

Value = torch.Tensor | BlockTensor


@dataclass(frozen=True)
class Entry:
    """One logical tensor: what it will be, how to get it, and the stored tensor it is made from."""

    info: TensorInfo
    load: Callable[[], Value]
    source: TensorInfo


class Model(Mapping[str, Value]):
    """Logical names -> tensors, computed when asked for.

    ``quantization`` is what the recipe wants: the pass that rounds makes it so. Passes return a new model.
    """

    def __init__(self, config: dict[str, Any], entries: Mapping[str, Entry], quantization: Quantization):
        self.config, self.entries, self.quantization = config, dict(entries), quantization

    def __getitem__(self, name: str) -> Value:
        return self.entries[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def infos(self) -> list[TensorInfo]:
        """Every tensor in order, without reading it."""
        return [entry.info for entry in self.entries.values()]

    def with_entries(self, changed: Mapping[str, Entry]) -> "Model":
        """A copy in which ``changed`` replaces the entries of the same names."""
        return Model(self.config, self.entries | dict(changed), self.quantization)


class FusedReader:
    """Gives pieces of fused tensors, holding one fused tensor from its first piece to its last."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint, self._lock = checkpoint, Lock()
        self._held: tuple[str, torch.Tensor] | None = None
        self._left = 0

    def take(self, name: str, piece: Piece, count: int) -> torch.Tensor:
        """``piece`` of the fused tensor ``name``, which has ``count``; safe to call from several threads."""
        with self._lock:
            if self._held is None or self._held[0] != name:
                self._held = None  # let go of the last one before the next is read
                self._held, self._left = (name, plain(self._checkpoint.load(name))), count
            fused = self._held[1]
            self._left -= 1
            if not self._left:
                self._held = None
        return piece.take(fused)


def plain(value: Value, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``value`` without blocks; floats are cast when ``dtype`` is given, and others left as they are."""
    if isinstance(value, BlockTensor):
        return value.dequantize(dtype or torch.bfloat16)
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def is_finite(value: Value) -> bool:
    """Whether ``value`` holds neither NaN nor Inf; blocks are looked at when they are made."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return True
    low, high = value.aminmax()  # NaN spreads to both, so one pass finds all
    return bool(low.isfinite() and high.isfinite())


def retyped(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """``info`` after ``plain(..., dtype)``."""
    if info.dtype is not None and (dtype is None or not info.dtype.is_floating_point):
        return info
    dtype = dtype or torch.bfloat16
    return replace(info, dtype=dtype, format=None, nbytes=info.numel * dtype.itemsize, shard="")


def formatted(info: TensorInfo, format_name: str) -> TensorInfo:
    """``info`` held in the block format ``format_name``. Raises FourfoldError for a shape it cannot hold."""
    layouts = get_format(format_name).empty_shapes(info.shape).values()
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layouts)
    return replace(info, dtype=None, format=format_name, nbytes=nbytes, shard="")
