"""``linear`` for weights without a kernel: expand a slice, let torch multiply, go on with the next.

A value of an MX format is a short integer times a power of two and therefore exact in bfloat16, down to
bfloat16's smallest step of 2^-133 (an MXFP8 code under the very smallest scales may lie below it, and is
rounded by less than 2^-133). So for a bfloat16 ``x`` the slice is expanded to bfloat16, and torch's own
matrix product, which sums in float32, loses nothing against the reference. Other formats have scales with
more bits and are multiplied in float32. The price is the expansion on every call.
"""

from functools import cache

import torch

from fourfold.formats import BlockTensor, get_format
from fourfold.kernels.reference import row_slices, slice_rows

SLICE_VALUES = 2**21


def linear(x: torch.Tensor, w: BlockTensor) -> torch.Tensor:
    """``x`` [M, K] times ``w`` [N, K] transposed, [M, N] in the dtype of ``x``; no gradients."""
    exact = x.dtype == torch.float32 or exact_in_bfloat16(w.format)
    factor = x.detach() if exact else x.detach().float()
    out = factor.new_empty(len(x), len(w.blocks))
    for rows in row_slices(out.shape[1], x.shape[1], SLICE_VALUES):
        torch.mm(factor, slice_rows(w, rows).dequantize(factor.dtype).T, out=out[:, rows])
    return out.to(x.dtype)


@cache
def exact_in_bfloat16(format_name: str) -> bool:
    """Whether the format's values are bfloat16s: elements of at most 8 bits under a power of two.

    Values that need a step below 2^-133 (MXFP8 under scales below 2^-117) are not, and become the nearest.
    """
    return get_format(format_name).scale == "e8m0"
