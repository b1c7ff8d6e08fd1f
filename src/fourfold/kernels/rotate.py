"""``rotate``: what a layer's input goes through when its checkpoint turns inputs inside their blocks.

The product is float32 whatever the dtype of ``x`` and is rounded once, as compressed-tensors does it. It is
one small matrix product for each distinct input: layers that share an input and a matrix are one layer by
then.
"""

import torch

from fourfold.core.errors import FourfoldError
from fourfold.formats import turn


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """``x`` [..., K] with every run of n values multiplied by ``rotation`` [n, n] from the right.

    ``rotation`` is float32, the result has the dtype of ``x``. Raises FourfoldError when n does not divide K.
    """
    size = rotation.shape[0]
    if x.shape[-1] % size:
        raise FourfoldError(
            f"rotate turns runs of {size} values, but x {list(x.shape)} is no multiple of it."
        )
    return turn(x, rotation)
