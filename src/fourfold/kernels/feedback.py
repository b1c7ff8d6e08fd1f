"""Rounding inputs for the weight that multiplies them: what rounding one value loses, the next make up for.

GPTQ (Frantar et al., arXiv:2210.17323) rounds a weight so that its product with known inputs stays right.
Here the parts are changed: the weight W [out, in] is known, and each input x is rounded when it comes. Of
the values that a format has near x, those are wanted that lose least of x W^T, |(x - q) W^T|^2, so H = W^T W
takes the place that X^T X has there. Inside groups of neighbours, with U the upper Cholesky factor of H^-1,

    q_j = nearest(x_j),   x_k -= (x_j - q_j) U_jk / U_jj   for every later k of the group.

A block's scale is taken when its first value is reached. The format is unchanged, nothing is calibrated, and
nothing is stored: U follows from the weight. ``InputFeedback`` is the specification in torch, for any device
and any MX format of floats; it goes to C++ on a CPU and to Triton on a GPU where these can.

The price: ``group`` / 2 multiply-adds for every value of an input (a Hadamard matrix of 32 takes 32), and a
matrix of 4 * group bytes for every input feature, in memory.
"""

from importlib.util import find_spec
from typing import get_args

import torch
from torch import Tensor

from fourfold.core.quantization import FeedbackGroup
from fourfold.formats import BlockFormat, get_format
from fourfold.kernels.cpu.column_rounding import MOST_COLUMNS
from fourfold.kernels.cpu.row_rounding import RowRounding

RIDGE = 0.01  # of H's mean diagonal, added to it
BLOCK = 32
GROUPS = get_args(FeedbackGroup)
assert max(GROUPS) == MOST_COLUMNS


def takes_feedback(activation: str | None) -> bool:
    """Whether inputs in the format ``activation`` can be rounded so: blocks of floats under powers of two."""
    form = get_format(activation) if activation else None
    return form is not None and form.scale == "e8m0" and not form.element.is_integer


def group_of(inputs: int, most: int) -> int:
    """The largest group of at most ``most`` that divides ``inputs``, itself a multiple of 32."""
    return max(group for group in GROUPS if group <= most and inputs % group == 0)


class InputFeedback:
    """Rounds inputs [..., in] of ``weight`` [out, in] to the format ``activation``, in groups of ``most``
    values or what part of it divides ``in``.
    """

    def __init__(self, weight: Tensor, activation: str, most: int):
        self.form, self.group = get_format(activation), group_of(weight.shape[1], most)
        count = weight.shape[1] // self.group
        self.steps = torch.zeros(count, self.group, self.group, device=weight.device)
        self._rows: RowRounding | None = None
        self.update(weight)

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """From now on for ``weight``, in the same memory."""
        wide = weight.detach().float().unflatten(1, (-1, self.group))
        squares = torch.einsum("ogi,ogj->gij", wide, wide).double()
        mean = squares.diagonal(dim1=1, dim2=2).mean(-1)
        ridge = (RIDGE * mean).masked_fill_(mean == 0, 1.0)
        one = torch.eye(self.group, dtype=torch.float64, device=weight.device)
        squares += ridge[:, None, None] * one
        # with rows and columns turned about, the lower factor of H is R, upper, of H = R R^T; and U is R^-1
        upper = torch.linalg.cholesky_ex(squares.flip(1, 2))[0].flip(1, 2)
        inverse = torch.linalg.solve_triangular(upper, one.expand_as(upper), upper=True)
        self.steps.copy_((inverse / inverse.diagonal(dim1=1, dim2=2)[..., None]).triu_(1))
        self._rows = RowRounding.of(upper.float(), self.form)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [..., in] (bfloat16 or float32) as the served model multiplies it, in the dtype of ``x``."""
        values = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
        return self._rounded(values).to(x.dtype).view(x.shape)

    def _rounded(self, x: Tensor) -> Tensor:
        if self._rows is not None:
            return self._rows.round(x)
        if x.is_cuda and self.form.name == "mxfp4" and find_spec("triton"):
            from fourfold.kernels.gpu.feedback import round_mxfp4  # Triton is not everywhere

            return round_mxfp4(x, self.steps)
        return round_in_torch(x, self.steps, self.form)


def round_in_torch(x: Tensor, steps: Tensor, form: BlockFormat) -> Tensor:
    """The specification: ``x`` float32 [n, in] rounded with ``steps`` [in / group, group, group], which holds
    U_jk / U_jj above the diagonal and zeros elsewhere.
    """
    group = steps.shape[-1]
    left = x.unflatten(1, (-1, group)).clone()
    rounded = torch.empty_like(left)
    for begin in range(0, group, BLOCK):
        own = left[..., begin : begin + BLOCK]
        scale = form.multipliers(form.scales(own.reshape(-1, BLOCK))).view(left.shape[:2])
        for j in range(begin, begin + BLOCK):
            value = left[..., j].clone()
            rounded[..., j] = form.element.round(value / scale) * scale
            left -= (value - rounded[..., j])[..., None] * steps[:, j]
    return rounded.view(x.shape)
