"""What is known of a tensor without reading it, and the sources that hand tensors out one by one."""

from dataclasses import dataclass
from typing import Protocol

import torch

from fourfold.formats import BlockTensor


@dataclass(frozen=True)
class TensorInfo:
    """A logical tensor: ``shape`` counts values, ``nbytes`` all its stored bytes with scales.

    ``dtype`` is None when ``format`` (a name of ``fourfold formats``) says how its values are held.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    format: str | None
    nbytes: int
    shard: str = ""

    @property
    def numel(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()


class TensorSource(Protocol):
    """Tensors by logical name, each read when asked for."""

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor in file order; reads nothing."""
        ...

    def load(self, name: str) -> "torch.Tensor | BlockTensor":
        """The tensor ``name``; only its own bytes are read."""
        ...

    def mapped(self, name: str) -> "torch.Tensor | BlockTensor":
        """The tensor ``name`` without a copy of its bytes, as far as they are in the file as they are."""
        ...
