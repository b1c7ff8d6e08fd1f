"""Rounding a weight column by column, as GPTQ does: the scale of each block of columns, then its values.

A block's scale is taken when its first column is reached, from the weights as they then are. Weights are
held turned, [columns, out], so that a column of the weight is a run of memory, and in units of the block's
scale while its columns are rounded, so that nothing is divided or multiplied column by column. Price: nine
calls per column, which on a GPU or with few rows cost more than what they compute, and with a search for
scales one rounding more of everything for every scale that is tried.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fourfold.compress.calibrated.column_feedback import Block, Feedback, blocks_of
from fourfold.compress.calibrated.nearest import Nearest
from fourfold.compress.calibrated.turned import Turned
from fourfold.formats import BlockFormat
from fourfold.kernels.cpu.column_rounding import ColumnRounding

STEP = 32  # columns whose errors reach the rest of their block one by one


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
        scaled, rounded = torch.empty_like(columns), torch.empty_like(columns)
        nearest = Nearest(self.block_format.element, columns)
        for multiplier in self._neighbours(start):
            torch.div(columns, multiplier, out=scaled)
            nearest(scaled, rounded)
            error = (counts @ rounded.sub_(scaled).square_()).mul_((multiplier / start).square_())
            better = error < best_error
            best, best_error = torch.where(better, multiplier, best), torch.where(better, error, best_error)
        return self.block_format.nearest_scales(best[:, None], self.whole), best

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


def round_columns(turned: Turned, feedback: Feedback, size: int, grid: Grid) -> None:
    """Round ``turned``; ``size`` of its columns share a scale."""
    tensors = (turned.weight, turned.blocks, turned.scales)
    native = ColumnRounding.of(*tensors, grid.block_format, grid.rule, grid.search)
    if native is None:
        _round_in_torch(turned, feedback, size, grid)
        return
    for columns in blocks_of(turned.width):
        feedback.finish(columns, *native.round(turned.starts(columns), *feedback.block(columns)))


def _round_in_torch(turned: Turned, feedback: Feedback, size: int, grid: Grid) -> None:
    multiplier = None
    for columns in blocks_of(turned.width):
        block = feedback.block(columns)
        diagonal = block.factor.diagonal()
        sweep = Sweep(turned.take(columns), block, diagonal, grid)
        for begin in range(columns.start, columns.stop, min(size, STEP)):
            local = begin - columns.start
            if begin == 0 and size > columns.stop:  # a scale for the whole row
                held, multiplier = grid.scales(turned.weight.T, feedback.diagonal())
                turned.put_scales(0, held)
            elif begin % size == 0:
                shared = slice(local, local + size)
                held, multiplier = grid.scales(sweep.standing(shared), diagonal[shared])
                turned.put_scales(begin, held)
            assert multiplier is not None
            sweep.round(slice(local, min(local + min(size, STEP), len(sweep.w))), multiplier)
        turned.put(columns, sweep.rounded, sweep.codes)
        feedback.finish(columns, sweep.errors, sweep.before)


class Sweep:
    """The rounding of one block of columns ``w`` [b, out] to ``rounded`` and ``codes`` [b, out].

    ``errors`` and ``before`` are w - q and c of :mod:`fourfold.compress.calibrated.column_feedback`. They lie
    side by side, so that one product with what lies before a column gives all that its feedback is.
    """

    def __init__(self, w: torch.Tensor, block: Block, diagonal: torch.Tensor, grid: Grid):
        self.w, self._element = w, grid.block_format.element
        self.rounded, self.codes = torch.empty_like(w), torch.empty_like(w, dtype=torch.uint8)
        matrices = [block.factor] if block.pull is None else [block.factor, block.pull]
        self._kinds = len(matrices)
        # [to, from] so that what reaches one column is a row
        self._reach = torch.stack([m.T / diagonal[:, None] for m in matrices], -1).flatten(1)
        self._told = w.new_empty(len(w), self._kinds, w.shape[-1])
        self.errors = self._told[:, 0]
        self.before = torch.empty_like(w) if block.pull is None else self._told[:, 1]
        if block.pending is None:
            self.before.copy_(w)
        else:
            torch.add(w, block.pending.div_(diagonal[:, None]), out=self.before)
        self._nearest = Nearest(self._element, w[0])

    def standing(self, columns: slice) -> torch.Tensor:
        """``columns`` as the rounding of all before them leaves them; ``before`` is so for the first."""
        own = self.w[columns]
        factor = self._reach[columns, columns.start * self._kinds : columns.stop * self._kinds : self._kinds]
        one = torch.eye(len(own), dtype=own.dtype, device=own.device)
        inverse = torch.linalg.solve_triangular(factor, one, upper=False, unitriangular=True)
        return torch.addmm(own, inverse, self.before[columns] - own)

    def round(self, columns: slice, multiplier: torch.Tensor) -> None:
        """Round ``columns`` under one ``multiplier`` [out], and tell the later ones of the block."""
        told = self._told[columns]
        self._round_scaled(columns, (self.w[columns] / multiplier).unbind(), multiplier)
        told.mul_(multiplier)
        if self._kinds == 1:
            self.before[columns].mul_(multiplier)
        if columns.stop < len(self.w):
            reach = self._reach[columns.stop :, columns.start * self._kinds : columns.stop * self._kinds]
            self.before[columns.stop :].addmm_(reach, told.flatten(0, 1))

    def _round_scaled(self, columns: slice, w: tuple[torch.Tensor, ...], multiplier: torch.Tensor) -> None:
        """One by one, all in units of ``multiplier``."""
        before, told = self.before[columns].div_(multiplier), self._told[columns].flatten(0, 1).T
        reach = self._reach[columns, columns.start * self._kinds : columns.stop * self._kinds].unbind()
        scaled, errors = self.rounded[columns], self.errors[columns].unbind()
        for j, (column, rounded) in enumerate(zip(before.unbind(), scaled.unbind(), strict=True)):
            if j:
                known = j * self._kinds
                column.addmv_(told[:, :known], reach[j][:known])
            self._nearest(column, rounded)
            torch.sub(w[j], rounded, out=errors[j])
        self.codes[columns] = self._element.encode(scaled)
        scaled.mul_(multiplier)
