"""``linear`` for many rows of x: expand a slice of the weight, let torch multiply, go on with the next.

A value of an MX format is a short integer times a power of two and therefore exact in bfloat16, so for a
bfloat16 ``x`` the slice is expanded to bfloat16 and torch's own matrix product, which sums in float32, loses
nothing against the reference. Other formats have scales with more bits and are multiplied in float32. The
price is the expansion on every call, which pays off from about a dozen rows of x on.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import linear as dense_linear

from fourfold.formats import BlockTensor, get_format
from fourfold.kernels.reference import row_slices, slice_rows

SLICE_VALUES = 2**21

Expand = Callable[[BlockTensor, torch.dtype], torch.Tensor]


def linear(x: torch.Tensor, w: BlockTensor, expand: Expand = BlockTensor.dequantize) -> torch.Tensor:
    """``x`` [M, K] times ``w`` [N, K] transposed, [M, N]; ``expand`` reads a slice of ``w`` back."""
    exact = x.dtype == torch.float32 or exact_in_bfloat16(w.format)
    factor = x if exact else x.float()
    slices = list(row_slices(w.shape, SLICE_VALUES))
    if len(slices) == 1:
        return dense_linear(factor, expand(w, factor.dtype)).to(x.dtype)
    out = x.new_empty(len(x), w.shape[0])
    for rows in slices:
        out[:, rows] = dense_linear(factor, expand(slice_rows(w, rows), factor.dtype))
    return out


def exact_in_bfloat16(format_name: str) -> bool:
    """Whether every value of the format is a bfloat16: elements of at most 8 bits under a power of two."""
    return get_format(format_name).scale == "e8m0"
