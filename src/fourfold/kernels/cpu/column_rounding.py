"""GPTQ's rounding of some columns in C++: every row's 128 columns in one visit of the weight.

``cpp/column_rounding.h`` says what it computes; :mod:`fourfold.compress.calibrated.column_rounding` does the
same in torch, for every format and device. Here 16 rows go side by side through registers and the first
cache, where torch makes nine calls for each column.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.formats import BlockFormat, ScaleRule
from fourfold.formats.numbers.scale import smallest_fraction_added
from fourfold.kernels.cpu import native

BLOCK = 32
MOST_COLUMNS = 128  # in one call


@dataclass(frozen=True)
class ColumnRounding:
    """``weight`` float32 [out, in] becomes what it is rounded to; ``codes`` and ``scales`` are those of a
    BlockTensor of ``block_format``, an MX format of floats. ``search`` tries neighbours of ``rule``'s scale.
    """

    weight: Tensor
    codes: Tensor
    scales: Tensor
    block_format: BlockFormat
    rule: ScaleRule
    search: bool
    results: Tensor

    @classmethod
    def of(
        cls,
        weight: Tensor,
        codes: Tensor,
        scales: Tensor,
        block_format: BlockFormat,
        rule: str | None,
        search: bool,
    ) -> "ColumnRounding | None":
        """None for what takes torch: another device or layout, other formats, a rule with a search."""
        here = native is not None and weight.device.type == "cpu"
        plain = weight.dtype == torch.float32 and weight.is_contiguous() and weight.numel() > 0
        floats = block_format.scale == "e8m0" and not block_format.element.is_integer
        chosen = ScaleRule(rule) if rule else block_format.default_rule
        if not (here and plain and floats) or chosen in (None, ScaleRule.MSE):
            return None
        results = weight.new_empty(2, MOST_COLUMNS * len(weight))
        return cls(weight, codes, scales, block_format, chosen, search, results)

    def round(
        self, starts: list[int], factor: Tensor, pull: Tensor | None, pending: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Round the 32 columns from each of ``starts`` on, in this order.

        ``factor``, ``pull`` [b, b] and ``pending`` [b, out] are those of the feedback's block. Returns the
        errors w - q and what the columns were before they were rounded, [b, out] each, until the next call.
        """
        assert native is not None
        element, diagonal = self.block_format.element, factor.diagonal()
        reach = (factor.T / diagonal[:, None]).contiguous()
        errors, before = self.results[:, : len(factor) * len(self.weight)].view(2, len(factor), -1)
        native.round_columns(
            self.weight,
            self.codes,
            self.scales,
            torch.tensor([starts]),
            reach,
            None if pull is None else (pull.T / diagonal[:, None]).contiguous(),
            _standing(reach),
            diagonal[None].contiguous(),
            None if pending is None else pending.contiguous(),
            errors,
            before,
            (
                element.bits,
                element.mantissa_bits,
                element.min_exponent,
                element.max_exponent,
                element.max,
                smallest_fraction_added(element, self.rule),
            ),
            self.search,
            torch.get_num_threads() == 1,
        )
        return errors, before


def _standing(reach: Tensor) -> Tensor:
    """By block [32, 32], how feedback becomes what a block is once all columns before it are rounded."""
    blocks = range(0, len(reach), BLOCK)
    own = torch.stack([reach[begin : begin + BLOCK, begin : begin + BLOCK] for begin in blocks])
    one = torch.eye(BLOCK).expand_as(own)
    inverse = torch.linalg.solve_triangular(own, one, upper=False, unitriangular=True)
    return inverse.reshape(-1, BLOCK).contiguous()
