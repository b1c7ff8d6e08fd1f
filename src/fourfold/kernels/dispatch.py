"""Which way a ``linear`` goes: the contract is checked here, once, so that kernels need not.

A weight that was packed for the C++ kernels goes to them; one in blocks is expanded and multiplied by torch,
a plain one is multiplied by torch. ``pack`` packs what can be packed, once, when it is loaded.
"""

import torch
from torch.nn.functional import linear as dense_linear

from fourfold.core.errors import FourfoldError
from fourfold.formats import BlockTensor
from fourfold.kernels import expanded
from fourfold.kernels.cpu import native
from fourfold.kernels.cpu.packed import KINDS, PackedWeight
from fourfold.kernels.reference import activate

DTYPES = (torch.bfloat16, torch.float32)

Weight = BlockTensor | PackedWeight | torch.Tensor


def pack(w: Weight) -> Weight:
    """``w`` [N, K] as ``linear`` is fastest with it here; what is packed holds nothing of ``w``."""
    if native is None or not isinstance(w, BlockTensor) or w.format not in KINDS:
        return w
    return PackedWeight.pack(w) if w.blocks.device.type == "cpu" else w


def linear(x: torch.Tensor, w: Weight, activation: str | None = None) -> torch.Tensor:
    """``x`` [..., K] (bfloat16 or float32) times ``w`` [N, K] transposed: [..., N] in the dtype of ``x``.

    ``activation`` names the format that ``x`` is rounded to first (any of ``fourfold formats``; None leaves
    it as it is). Sums are float32; ``reference.linear`` is the specification. Raises FourfoldError where
    shapes, dtypes or devices do not fit, UsageError for an unknown format.
    """
    check(x, w)
    factor = x if activation is None else rounded(x, activation)
    if factor.ndim == 2:
        out = multiply(factor, w)
    else:
        out = multiply(factor.reshape(-1, factor.shape[-1]), w)
        out = out.view(*x.shape[:-1], out.shape[-1])
    return out if out.dtype == x.dtype else out.to(x.dtype)


def multiply(x: torch.Tensor, w: Weight) -> torch.Tensor:
    """``x`` [M, K] times ``w`` transposed."""
    if isinstance(w, PackedWeight):
        return w.exactly(x)
    if isinstance(w, BlockTensor):
        return expanded.linear(x, w)
    return dense_linear(x, w if w.dtype == x.dtype else w.to(x.dtype))


def rounded(x: torch.Tensor, activation: str) -> torch.Tensor:
    """``x`` in the format ``activation``; as float32 where a bfloat16 could not hold the format's values."""
    exact = x.dtype == torch.float32 or expanded.exact_in_bfloat16(activation)
    return activate(x if exact else x.float(), activation)


def check(x: torch.Tensor, w: Weight) -> None:
    """Raises FourfoldError unless ``linear`` is defined for these operands."""
    shape = tuple(w.shape)
    device = (w if isinstance(w, torch.Tensor) else w.blocks if isinstance(w, BlockTensor) else w.data).device
    if x.dtype not in DTYPES:
        raise FourfoldError(f"linear got x in {x.dtype}; convert it to torch.bfloat16 or torch.float32.")
    if len(shape) != 2 or x.ndim == 0:
        raise FourfoldError(
            f"linear multiplies x [..., K] by one matrix [N, K], but got x {list(x.shape)} and a weight "
            f"{list(shape)}; index a stack of matrices first."
        )
    if x.shape[-1] != shape[1]:
        raise FourfoldError(
            f"linear got x {list(x.shape)} for a weight {list(shape)}: their last dimensions must be equal."
        )
    if x.device != device:
        raise FourfoldError(f"linear got x on {x.device} and w on {device}; move one to the other.")
