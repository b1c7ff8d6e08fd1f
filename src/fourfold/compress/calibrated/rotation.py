"""Rotations inside a block: the input's 32 values of a block are mixed, and the weight holds the inverse.

Spreading an outlier over its own block costs nothing elsewhere: no other block's power-of-two scale moves,
which is why block rotation helps MXFP4 where a rotation over all channels can hurt (arXiv:2509.23202 and
arXiv:2511.04214). ``H`` is the Sylvester Hadamard matrix over sqrt(32): symmetric, and its own inverse.
"""

import torch

from fourfold.core.quantization import LayerScheme
from fourfold.formats import BlockTensor

BLOCK = 32


def hadamard(size: int = BLOCK) -> torch.Tensor:
    """The normalised Hadamard matrix [size, size] in float32; ``size`` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotation_of(
    scheme: LayerScheme, trained: torch.Tensor | BlockTensor | None, device: torch.device
) -> torch.Tensor | None:
    """The matrix [32, 32] that a layer's input is multiplied by, or None."""
    if scheme.input_transform is None:
        return None
    if scheme.input_transform == "hadamard":
        return hadamard().to(device)
    assert isinstance(trained, torch.Tensor), "a trained rotation is stored with its layer"
    return trained.to(device, torch.float32)
