"""Rotation inside a block: every run of n values times one orthogonal matrix.

Spreading an outlier over its own block of 32 costs nothing elsewhere: no other block's power-of-two scale
moves, which is why block rotation helps MXFP4 where a rotation over all channels can hurt (arXiv:2511.04214,
arXiv:2509.23202). With x' = x R and W' = W R the product x' W'^T is x W^T, so the weight is turned once and
the input whenever the model runs: 2 x 32 operations for every input value.
"""

from functools import cache

import torch

ROTATION_SIZE = 32


@cache
def hadamard_signs(size: int = ROTATION_SIZE) -> torch.Tensor:
    """Sylvester's Hadamard matrix [size, size] of +1 and -1, int8; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hadamard(size: int = ROTATION_SIZE) -> torch.Tensor:
    """The normalised Hadamard matrix [size, size] in float32: symmetric, and its own inverse."""
    return hadamard_signs(size) / torch.tensor(float(size)).sqrt()


def turn(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Every run of n values along the last dimension of ``x`` times ``rotation`` [n, n], in ``x``'s dtype.

    The product is float32 (or float64, as ``x``): a matrix of bfloat16s would not be orthogonal, and one of
    Hadamard would make every value smaller by 1e-4.
    """
    size = rotation.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return (x.to(wide).unflatten(-1, (-1, size)) @ rotation.to(wide)).flatten(-2).to(x.dtype)
