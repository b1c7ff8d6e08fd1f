"""Which kernel runs a ``linear``: the contract is checked here, once, so that kernels need not.

A kernel is a module of ``kernels/cpu`` (later also ``kernels/gpu``) that exports KERNEL. For a packed weight
the first kernel for its format that accepts the call is taken, in the order of their names; if none does, the
weight is expanded and multiplied by torch.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch.nn.functional import linear as dense_linear

from fourfold.core.errors import FourfoldError
from fourfold.formats import BlockTensor, get_format
from fourfold.kernels import cpu, expanded
from fourfold.kernels.reference import activate

DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LinearKernel:
    """One fast way to multiply by a packed weight.

    ``takes(x, w)`` says whether it can serve this call here and now. ``run(x, w)`` gets a contiguous ``x``
    [M, K] (bfloat16 or float32) and a ``w`` [N, K] on its device, and returns [M, N] in the dtype of ``x``.
    """

    weight_format: str
    takes: Callable[[torch.Tensor, BlockTensor], bool]
    run: Callable[[torch.Tensor, BlockTensor], torch.Tensor]


def linear(x: torch.Tensor, w: BlockTensor | torch.Tensor, activation: str | None = None) -> torch.Tensor:
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


def multiply(x: torch.Tensor, w: BlockTensor | torch.Tensor) -> torch.Tensor:
    """``x`` [M, K] times ``w`` transposed, by the first kernel that accepts them."""
    if not isinstance(w, BlockTensor):
        return dense_linear(x, w if w.dtype == x.dtype else w.to(x.dtype))
    x = x.contiguous()
    for kernel in kernels_for(w.format):
        if kernel.takes(x, w):
            return kernel.run(x, w)
    return expanded.linear(x, w)


def rounded(x: torch.Tensor, activation: str) -> torch.Tensor:
    """``x`` in the format ``activation``; as float32 where a bfloat16 could not hold the format's values."""
    exact = x.dtype == torch.float32 or expanded.exact_in_bfloat16(activation)
    return activate(x if exact else x.float(), activation)


@cache
def kernels_for(weight_format: str) -> tuple[LinearKernel, ...]:
    """The kernels for one weight format; a module of ``kernels/cpu`` without a KERNEL is machinery."""
    names = [m.name for m in pkgutil.iter_modules(cpu.__path__) if not m.name.startswith("_")]
    modules = [import_module(f"{cpu.__name__}.{name}") for name in names]
    kernels = [module.KERNEL for module in modules if hasattr(module, "KERNEL")]
    return tuple(kernel for kernel in kernels if kernel.weight_format == weight_format)


@cache
def element_bits(weight_format: str) -> int:
    """Bits of a code; looked up once, since ``linear`` is called hundreds of times a token."""
    return get_format(weight_format).element.bits


def check(x: torch.Tensor, w: BlockTensor | torch.Tensor) -> None:
    """Raises FourfoldError unless ``linear`` is defined for these operands."""
    held, width_bits = (w.blocks, element_bits(w.format)) if isinstance(w, BlockTensor) else (w, 8)
    if x.dtype not in DTYPES:
        raise FourfoldError(f"linear got x in {x.dtype}; convert it to torch.bfloat16 or torch.float32.")
    if held.ndim != 2 or x.ndim == 0:
        raise FourfoldError(
            f"linear multiplies x [..., K] by one matrix [N, K], but got x {list(x.shape)} and a weight "
            f"{list(w.shape)}; index a stack of matrices first."
        )
    if x.shape[-1] * width_bits != held.shape[1] * 8:
        raise FourfoldError(
            f"linear got x {list(x.shape)} for a weight {list(w.shape)}: their last dimensions must be equal."
        )
    if x.device != held.device:
        raise FourfoldError(f"linear got x on {x.device} and w on {held.device}; move one to the other.")
