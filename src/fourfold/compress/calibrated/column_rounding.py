"""Rounding a weight column by column, as GPTQ does: the scale of each block of columns, then its values.

A block's scale is taken when its first column is reached, from the weights as they then are. Weights are
held turned, [in, out], so that a column of the weight is a run of memory. Price: some 15 calls per column,
and with a search for scales one rounding more of everything for every scale that is tried.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fourfold.compress.calibrated.column_feedback import Block, Feedback, blocks_of
from fourfold.formats import BlockFormat

STEP = 16  # columns whose errors reach the rest of their block one by one


@dataclass
class Grid:
    """The values that a block of columns may take."""

    block_format: BlockFormat
    rule: str | None
    whole: torch.Tensor | None
    search: bool

    def scales(self, columns: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales of ``columns`` [block, out] as they are held, and what they multiply by [out].

        With ``search`` the one of some neighbours that leaves the least error, each column's error multiplied
        by its ``importance`` [block] as GPTQ's loss counts it.
        """
        held = self.block_format.scales(columns.T.contiguous(), self.rule, self.whole)
        start = self._multipliers(held, columns.shape[-1])
        if not self.search or not held.ndim:
            return held, start
        best, best_error = start, torch.full_like(start, torch.inf)
        counts = importance.square()
        for multiplier in self._neighbours(start):
            error = counts @ self.round(columns, multiplier).sub_(columns).square_()
            better = error < best_error
            best, best_error = torch.where(better, multiplier, best), torch.where(better, error, best_error)
        return self.block_format.nearest_scales(best[:, None], self.whole), best

    def round(self, columns: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        """``columns`` [..., out] at the nearest values under ``multiplier`` [out]."""
        return self.block_format.element.round(columns / multiplier).mul_(multiplier)

    def whole_if_two_levels(self) -> torch.Tensor | None:
        """The global scale that is stored beside block scales."""
        return self.whole if self.block_format.block_size else None

    def _neighbours(self, start: torch.Tensor) -> Iterator[torch.Tensor]:
        """Multipliers [out] that scales can stand for, with ``start`` first."""
        yield start
        if self.block_format.scale == "e8m0":
            yield (start * 2).clamp_max_(2.0**127)
            yield (start / 2).clamp_min_(2.0**-127)
            return
        for factor in (0.95, 0.9, 0.85, 0.8):
            held = self.block_format.nearest_scales((start * factor)[:, None], self.whole)
            yield self._multipliers(held, len(start))

    def _multipliers(self, held: torch.Tensor, rows: int) -> torch.Tensor:
        return self.block_format.multipliers(held, self.whole_if_two_levels()).reshape(-1).expand(rows)


def round_columns(w: torch.Tensor, feedback: Feedback, size: int, grid: Grid) -> list[torch.Tensor]:
    """Round ``w`` [in, out] in place, row by row, which are the weight's columns; ``size`` of them share one
    of the scales that are returned.
    """
    scales: list[torch.Tensor] = []
    multiplier = w[0]
    for columns in blocks_of(len(w)):
        block = feedback.block(columns)
        diagonal = block.factor.diagonal()
        sweep = Sweep(w[columns], block, diagonal)
        for begin in range(columns.start, columns.stop, min(size, STEP)):
            if begin == 0 and size > columns.stop:  # a scale for the whole row
                held, multiplier = grid.scales(w, feedback.diagonal())
                scales.append(held)
            elif begin % size == 0:
                shared = slice(begin - columns.start, begin - columns.start + size)
                held, multiplier = grid.scales(sweep.standing(shared), diagonal[shared])
                scales.append(held)
            sweep.round(begin - columns.start, min(size, STEP), grid, multiplier)
        feedback.finish(columns, sweep.errors, sweep.before)
    return scales


class Sweep:
    """The rounding of one block of columns ``w`` [b, out], which become the rounded values; ``errors`` and
    ``before`` are w - q and c of :mod:`fourfold.compress.calibrated.column_feedback`.
    """

    def __init__(self, w: torch.Tensor, block: Block, diagonal: torch.Tensor):
        self.w = w
        self.before = w.clone() if block.pending is None else (block.pending.div_(diagonal[:, None]).add_(w))
        self.errors = torch.empty_like(w)
        self._factor = block.factor / diagonal
        self._pull = None if block.pull is None else block.pull / diagonal

    def standing(self, columns: slice) -> torch.Tensor:
        """``columns`` as the rounding of all before them leaves them; ``before`` is so for the first."""
        own = self.w[columns]
        one = torch.eye(len(own), dtype=own.dtype, device=own.device)
        inverse = torch.linalg.solve_triangular(
            self._factor[columns, columns], one, upper=True, unitriangular=True
        )
        return torch.addmm(own, inverse.T, self.before[columns] - own)

    def round(self, begin: int, count: int, grid: Grid, multiplier: torch.Tensor) -> None:
        """Round ``count`` columns under one ``multiplier`` [out]."""
        end = min(begin + count, len(self.w))
        for j in range(begin, end):
            rounded = grid.round(self.before[j], multiplier)
            error = torch.sub(self.w[j], rounded, out=self.errors[j])
            self.w[j] = rounded
            if j + 1 < end:
                self.before[j + 1 : end].addr_(self._factor[j, j + 1 : end], error)
                if self._pull is not None:
                    self.before[j + 1 : end].addr_(self._pull[j, j + 1 : end], self.before[j])
        done, rest = slice(begin, end), slice(end, len(self.w))
        if end < len(self.w):
            self.before[rest].addmm_(self._factor[done, rest].T, self.errors[done])
            if self._pull is not None:
                self.before[rest].addmm_(self._pull[done, rest].T, self.before[done])
