"""Rounding rows of inputs in C++ as they come, by groups of neighbours: ``cpp/row_rounding.h``.

The specification is :mod:`fourfold.kernels.feedback`.
"""

import torch
from torch import Tensor

from fourfold.formats import BlockFormat
from fourfold.kernels.cpu import native
from fourfold.kernels.cpu.column_rounding import BLOCK, alone, element_rules, reach_of


class RowRounding:
    """Rounds whole rows, every group of b columns with the factor R [b, b] of its own."""

    def __init__(self, factors: Tensor, block_format: BlockFormat):
        rule = block_format.default_rule
        assert rule is not None, "MX formats have one"
        self._rules, self._width = element_rules(block_format, rule), factors.shape[-1]
        reaches = [reach_of(factor) for factor in factors]
        self._groups = [(reach, _standing(reach)) for reach in reaches]

    @classmethod
    def of(cls, factors: Tensor, block_format: BlockFormat) -> "RowRounding | None":
        """From ``factors`` float32 [groups, b, b]; None where there is no C++ for them."""
        here = native is not None and factors.device.type == "cpu"
        return cls(factors, block_format) if here and len(factors) else None

    def round(self, x: Tensor) -> Tensor:
        """``x`` float32 [n, in] rounded."""
        assert native is not None
        x = x.clone()
        if len(x):
            for group, matrices in enumerate(self._groups):
                native.round_rows(x, group * self._width, *matrices, self._rules, alone())
        return x


def _standing(reach: Tensor) -> Tensor:
    """By block [32, 32], how feedback becomes what a block is once all columns before it are rounded."""
    blocks = range(0, len(reach), BLOCK)
    own = torch.stack([reach[begin : begin + BLOCK, begin : begin + BLOCK] for begin in blocks])
    one = torch.eye(BLOCK).expand_as(own)
    inverse = torch.linalg.solve_triangular(own, one, upper=False, unitriangular=True)
    return inverse.reshape(-1, BLOCK).contiguous()
