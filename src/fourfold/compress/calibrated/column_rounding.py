"""Rounding a weight column by column, as GPTQ does, under scales that are chosen before.

With a scale fixed, columns need not come block by block: any order will do, and blocks stay as they are
stored. Weights are held turned, [in, out], the columns in the order of rounding, so that one is a run of
memory. Coordinate descent then goes through the columns again, as often as is asked (QuantEase, Behdin et
al., arXiv:2309.01885): each is rounded to what is best while all others stay as they are, which GPTQ could
not know of the later ones.

Price: a second copy of the weight, and a third for descent. In torch a column takes eleven calls, which cost
more than what they compute; where they can, C++ (kernels/cpu) and Triton (kernels/gpu) take their place.
"""

from importlib.util import find_spec
from typing import Protocol

import torch

from fourfold.compress.calibrated.column_feedback import Feedback, Solver, blocks_of
from fourfold.compress.calibrated.nearest import Nearest
from fourfold.compress.calibrated.scale_choice import Grid
from fourfold.formats import BlockTensor
from fourfold.kernels.cpu.column_rounding import ColumnRounding

STEP = 32  # columns whose errors reach the rest of their block one by one


class Columns(Protocol):
    """The columns of a weight, ``turned`` [in, out], and their scales."""

    @property
    def turned(self) -> torch.Tensor:
        """What becomes what it is rounded to."""
        ...

    def round(
        self, columns: slice, factor: torch.Tensor, pull: torch.Tensor | None, pending: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round ``columns``; ``factor``, ``pull`` and ``pending`` are those of a Block. Returns w - q and c
        of :mod:`fourfold.compress.calibrated.column_feedback`, [b, out] each, until the next call.
        """
        ...

    def put(self, weight: torch.Tensor) -> BlockTensor:
        """Write what was rounded into ``weight`` [out, in], and give it in the format."""
        ...


def turn(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The columns of ``weight`` [out, in] in ``order`` int64 [in], as rows of a new tensor."""
    # in two steps, each of which torch does by runs
    return weight.T.contiguous()[order]


def round_columns(
    weight: torch.Tensor, order: torch.Tensor, feedback: Feedback, grid: Grid, sweeps: int
) -> Columns:
    """The columns of ``weight`` float32 [out, in] in ``order``, rounded as ``feedback`` says and then by
    ``sweeps`` of coordinate descent.
    """
    importance = feedback.diagonal()[order.argsort()]
    by_format = (grid.block_format, grid.rule, grid.search)
    columns: Columns | None = ColumnRounding.of(weight, order, importance, *by_format)
    if columns is None:
        columns = TorchColumns(weight, order, importance, grid)
    _go_through(columns, feedback, len(order))
    if sweeps:
        descent = feedback.descent(turn(weight, order).sub_(columns.turned))
        for _ in range(sweeps):
            _go_through(columns, descent, len(order))
    return columns


def _go_through(columns: Columns, solver: Solver, width: int) -> None:
    for some in blocks_of(width):
        solver.finish(some, *columns.round(some, *solver.block(some)))


class TorchColumns:
    """For every format and device."""

    def __init__(
        self,
        weight: torch.Tensor,
        order: torch.Tensor,
        importance: torch.Tensor,
        grid: Grid,
    ):
        self.turned, self._order, self._grid = turn(weight, order), order, grid
        self._held, multipliers = grid.scales(weight, importance)
        self._multipliers = multipliers.T.contiguous()
        self._blocks = order // (grid.block_format.block_size or len(order))

    def round(
        self, columns: slice, factor: torch.Tensor, pull: torch.Tensor | None, pending: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Columns. Errors and what was before them lie side by side, so that one product with what lies
        before a column gives all that its feedback is.
        """
        w, blocks = self.turned[columns], self._blocks[columns]
        if w.is_cuda and find_spec("triton"):
            from fourfold.kernels.gpu import column_rounding  # Triton is not everywhere

            element = self._grid.block_format.element
            return column_rounding.round_columns(w, self._multipliers, blocks, factor, pull, pending, element)
        multipliers = self._multipliers[blocks]
        matrices = [factor] if pull is None else [factor, pull]
        # [to, from] so that what reaches one column is a row
        reach = torch.stack([m.T / factor.diagonal()[:, None] for m in matrices], -1).flatten(1)
        told = w.new_empty(len(w), len(matrices), w.shape[-1])
        before = torch.empty_like(w) if pull is None else told[:, 1]
        before.copy_(w)
        if pending is not None:
            before.add_(pending / factor.diagonal()[:, None])
        kinds = len(matrices)
        for begin in range(0, len(w), STEP):
            end = begin + STEP
            some, known = slice(begin, end), slice(begin * kinds, end * kinds)
            self._round_some(w[some], before[some], multipliers[some], reach[some, known], told[some])
            before[end:].addmm_(reach[end:, known], told[some].flatten(0, 1))
        return told[:, 0], before

    def _round_some(
        self,
        w: torch.Tensor,
        before: torch.Tensor,
        multipliers: torch.Tensor,
        reach: torch.Tensor,
        told: torch.Tensor,
    ) -> None:
        """One by one: ``w`` [b, out] becomes q."""
        rounded, nearest = torch.empty_like(w), Nearest(self._grid.block_format.element, w[0])
        kinds, rows = told.shape[1], told.flatten(0, 1).T
        each = zip(before, multipliers, w, rounded, told[:, 0], strict=True)
        for j, (column, multiplier, own, q, error) in enumerate(each):
            if j:
                column.addmv_(rows[:, : j * kinds], reach[j, : j * kinds])
            torch.div(column, multiplier, out=q)
            nearest(q, q)
            q.mul_(multiplier)
            torch.sub(own, q, out=error)
        w.copy_(rounded)

    def put(self, weight: torch.Tensor) -> BlockTensor:
        """See Columns."""
        weight.copy_(self.turned[self._order.argsort()].T)
        form, grid = self._grid.block_format, self._grid
        rule = grid.rule or form.default_rule
        return form.quantize_with_scales(weight, self._held, grid.whole_if_two_levels(), rule)
