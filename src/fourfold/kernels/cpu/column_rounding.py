"""GPTQ's rounding of some columns in C++: every row's 128 columns in one visit of the weight.

``cpp/column_rounding.h`` says what it computes; :mod:`fourfold.compress.calibrated.column_rounding` does the
same in torch, for every format and device. Here 16 rows go side by side through registers and the first
cache, where torch makes nine calls for each column.
"""

from dataclasses import dataclass
from typing import NamedTuple

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
        errors, before = self.results[:, : len(factor) * len(self.weight)].view(2, len(factor), -1)
        steps = Steps.of(factor)
        tall = None if pull is None else (pull.T / steps.diagonal.T).contiguous()
        pending = None if pending is None else pending.contiguous()
        rules = _rules(self.block_format, self.rule)
        _round(self, steps, torch.tensor([starts]), tall, pending, errors, before, rules)
        return errors, before


class Steps(NamedTuple):
    """A factor R [b, b] as C++ reads it: ``reach`` [b, b], ``standing`` [b, 32], ``diagonal`` [1, b]."""

    reach: Tensor
    standing: Tensor
    diagonal: Tensor

    @classmethod
    def of(cls, factor: Tensor) -> "Steps":
        """From R."""
        diagonal = factor.diagonal()
        reach = (factor.T / diagonal[:, None]).contiguous()
        return cls(reach, _standing(reach), diagonal[None].contiguous())


class RowRounding:
    """Rounds whole rows, every group of b columns with the factor R [b, b] of its own and without a pull."""

    def __init__(self, factors: Tensor, block_format: BlockFormat):
        rule = block_format.default_rule
        assert rule is not None, "MX formats have one"
        self._rules, self._format = _rules(block_format, rule), block_format
        first = range(0, len(factors) * factors.shape[-1], factors.shape[-1])
        self._groups = [
            (torch.tensor([list(range(begin, begin + len(factor), BLOCK))]), Steps.of(factor))
            for begin, factor in zip(first, factors, strict=True)
        ]

    @classmethod
    def of(cls, factors: Tensor, block_format: BlockFormat) -> "RowRounding | None":
        """From ``factors`` float32 [groups, b, b]; None where there is no C++ for them."""
        here = native is not None and factors.device.type == "cpu"
        return cls(factors, block_format) if here and len(factors) else None

    def round(self, x: Tensor) -> Tensor:
        """``x`` float32 [n, in] rounded."""
        if not len(x):
            return x
        x = x.clone()
        layout = self._format.empty_shapes(x.shape)
        codes, scales = (torch.empty(shape, dtype=dtype) for shape, dtype in layout.values())
        at = _Rounded(x, codes, scales)
        results = x.new_empty(2, MOST_COLUMNS * len(x))
        for starts, steps in self._groups:
            errors, before = results[:, : steps.diagonal.numel() * len(x)].view(2, -1, len(x))
            _round(at, steps, starts, None, None, errors, before, self._rules)
        return x


class _Rounded(NamedTuple):
    weight: Tensor
    codes: Tensor
    scales: Tensor
    search: bool = False


def _round(
    at: ColumnRounding | _Rounded,
    steps: Steps,
    starts: Tensor,
    pull: Tensor | None,
    pending: Tensor | None,
    errors: Tensor,
    before: Tensor,
    rules: tuple[int, int, int, int, float, int],
) -> None:
    assert native is not None
    alone = torch.get_num_threads() == 1
    matrices = (steps.reach, pull, steps.standing, steps.diagonal)
    native.round_columns(
        at.weight, at.codes, at.scales, starts, *matrices, pending, errors, before, rules, at.search, alone
    )


def _rules(block_format: BlockFormat, rule: ScaleRule) -> tuple[int, int, int, int, float, int]:
    element = block_format.element
    exponents = (element.min_exponent, element.max_exponent)
    added_from = smallest_fraction_added(element, rule)
    return (element.bits, element.mantissa_bits, *exponents, element.max, added_from)


def _standing(reach: Tensor) -> Tensor:
    """By block [32, 32], how feedback becomes what a block is once all columns before it are rounded."""
    blocks = range(0, len(reach), BLOCK)
    own = torch.stack([reach[begin : begin + BLOCK, begin : begin + BLOCK] for begin in blocks])
    one = torch.eye(BLOCK).expand_as(own)
    inverse = torch.linalg.solve_triangular(own, one, upper=False, unitriangular=True)
    return inverse.reshape(-1, BLOCK).contiguous()
