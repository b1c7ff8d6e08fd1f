"""A digest of every tensor as it was in memory, to be compared with what a reader gets, at any time.

The hash of a file says that its bytes are those that were written; a digest says that a reader finds the
right tensor in them: two experts that changed places keep every file's hash, and spoil a model. Digests are
of logical tensors (codes, scales, values), so they hold in every dialect.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch

from fourfold.checkpoint.checkpoint import Checkpoint
from fourfold.core.errors import FourfoldError
from fourfold.core.records import Record
from fourfold.formats import BlockTensor

DIGESTS_NAME = "fourfold-tensors.json"
HEX_DIGITS = 32


class TensorDigests(Record):
    """The content of ``fourfold-tensors.json``: file -> logical tensor -> digest."""

    kind: Literal["fourfold.tensors/1"] = "fourfold.tensors/1"
    files: dict[str, dict[str, str]]

    @property
    def tensors(self) -> dict[str, str]:
        """Every tensor's digest."""
        return {name: digest for names in self.files.values() for name, digest in names.items()}


def digest(value: torch.Tensor | BlockTensor) -> str:
    """The first 32 hexadecimal digits of the sha256 of a tensor's kind, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return _sha256(f"{value.dtype} {tuple(value.shape)}", value)
    parts = [value.blocks, value.scales]
    if value.global_scale is not None:
        # some dialects store the reciprocal; that of the reciprocal's reciprocal is the same to the last bit
        parts.append(1 / value.global_scale.float().reshape(1))
    return _sha256(f"{value.format} {tuple(value.shape)}", *parts)


def read_digests(folder: Path) -> TensorDigests | None:
    """The digests in ``folder``, or None when it has none. Raises FourfoldError for a damaged file."""
    path = folder / DIGESTS_NAME
    if not path.is_file():
        return None
    try:
        return TensorDigests.model_validate_json(path.read_text())
    except ValueError as error:
        raise FourfoldError(f"{path} cannot be understood. Copy the folder again.") from error


def differing(checkpoint: Checkpoint, digests: Mapping[str, str]) -> Iterator[str]:
    """The tensors of ``digests`` that ``checkpoint`` lacks or gives differently, one in memory at a time."""
    present = set(checkpoint.names())
    for name, expected in digests.items():
        if name not in present or digest(checkpoint.load(name)) != expected:
            yield name


def _sha256(kind: str, *tensors: torch.Tensor) -> str:
    found = hashlib.sha256(kind.encode())
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:HEX_DIGITS]
