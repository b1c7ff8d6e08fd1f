"""What the rounding of earlier columns asks of later ones, by one Cholesky factor and no inverse.

GPTQ takes U, the upper Cholesky factor of H^-1. With H = R R^T and R upper triangular, U is R^-1, and its
sums over errors become sums over differences: before column k is rounded it stands at

    c_k = w_k + (sum_{j<k} (w_j - q_j) R_jk + sum_{j<k} c_j T_jk) / R_kk

with the original weights w and the rounded ones q. T, the strict upper triangle of a (X0 - X)^T X R^-T / n,
is the pull of GPTAQ (its a triu(S U^T, 1) U, once triangular solves cancel). R and T are made block by block
from the last column to the first.

``DenseFeedback`` does so inside the two [in, in] matrices, in in^3 / 6 multiply-adds each, and per row of
weights in^2 / 2 each. Far fewer tokens than inputs are for
:mod:`fourfold.compress.calibrated.token_feedback`.

Coordinate descent asks the same of a block: to the rounded q_k, the best value while all others stay is

    c_k = q_k + (sum_j (w_j - q_j) H_jk + a sum_j w_j ((X0 - X)^T X / n)_jk) / H_kk,

so that H_bb takes the place of R_bb, q that of w, and what later columns are told is how q changed. Of H all
is still there: its upper triangle became R, its lower one and the blocks on the diagonal are kept. Price of
a sweep: in^2 multiply-adds per row.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

COLUMNS_AT_ONCE = 128


class Block(NamedTuple):
    """Of columns [b]: R_bb and T_bb [b, b] (upper), and the sums over the columns before them [b, out]."""

    factor: torch.Tensor
    pull: torch.Tensor | None
    pending: torch.Tensor | None


class Solver(Protocol):
    """Asked and told block by block, from the first column to the last."""

    def block(self, columns: slice) -> Block:
        """What other columns ask of ``columns``; valid until the next block is asked for."""
        ...

    def finish(self, columns: slice, errors: torch.Tensor, before: torch.Tensor) -> None:
        """``errors`` w - q and ``before`` c, [b, out], of ``columns``."""
        ...


class Feedback(Solver, Protocol):
    """Of columns that are rounded for the first time."""

    def diagonal(self) -> torch.Tensor:
        """R_jj [in]."""
        ...

    def descent(self, errors: torch.Tensor) -> Solver:
        """For further sweeps, whose w are what is rounded; ``errors`` w - q [in, out] of the first are used
        up.
        """
        ...


class DenseFeedback:
    """From R in the upper triangle of ``factor`` [in, in], and ``shift`` [in, in], a (X0 - X)^T X / n, of
    which T is made in place.
    """

    def __init__(
        self,
        factor: torch.Tensor,
        shift: torch.Tensor | None,
        own: dict[int, torch.Tensor],
        wanted: torch.Tensor | None,
    ):
        self._factor, self._own, self._wanted = factor, own, wanted
        self._pull = None if shift is None else _turn(shift, factor)
        self._errors: torch.Tensor | None = None
        self._before: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        hessian: torch.Tensor,
        shift: torch.Tensor | None,
        ridge: float,
        wanted: torch.Tensor | None = None,
    ) -> "DenseFeedback | None":
        """None, with ``hessian`` as it was, when it is not positive definite with ``ridge`` added. ``wanted``
        [in, out], shift^T W, is for descent alone.
        """
        own = _factorise(hessian, ridge)
        return None if own is None else cls(hessian, shift, own, wanted)

    def diagonal(self) -> torch.Tensor:
        """See Feedback."""
        return self._factor.diagonal()

    def block(self, columns: slice) -> Block:
        """See Feedback."""
        pull = None if self._pull is None else self._pull[columns, columns]
        pending = None
        if self._errors is not None:
            done = slice(columns.start)
            pending = self._factor[done, columns].T @ self._errors[done]
            if self._pull is not None and self._before is not None:
                pending.addmm_(self._pull[done, columns].T, self._before[done])
        return Block(self._factor[columns, columns], pull, pending)

    def finish(self, columns: slice, errors: torch.Tensor, before: torch.Tensor) -> None:
        """See Feedback."""
        if columns.stop == len(self._factor):
            return
        if self._errors is None:
            self._errors = errors.new_empty(len(self._factor), errors.shape[-1])
            self._before = None if self._pull is None else torch.empty_like(self._errors)
        self._errors[columns] = errors
        if self._before is not None:
            self._before[columns] = before

    def descent(self, errors: torch.Tensor) -> "DenseDescent":
        """See Feedback."""
        self._pull = self._errors = self._before = None
        return DenseDescent(self._factor, self._own, self._wanted, errors)


class DenseDescent:
    """From H in the lower triangle of ``hessian`` and the blocks ``own`` on its diagonal, and what the shift
    of the inputs has ``wanted`` [in, out].
    """

    def __init__(
        self,
        hessian: torch.Tensor,
        own: dict[int, torch.Tensor],
        wanted: torch.Tensor | None,
        errors: torch.Tensor,
    ):
        self._hessian, self._own, self._wanted, self._errors = hessian, own, wanted, errors

    def block(self, columns: slice) -> Block:
        """See Solver."""
        begin, end = columns.start, columns.stop
        own, errors = self._own[begin], self._errors
        pending = own @ errors[columns]
        pending.addmm_(self._hessian[columns, :begin], errors[:begin])
        pending.addmm_(self._hessian[end:, columns].T, errors[end:])
        if self._wanted is not None:
            pending += self._wanted[columns]
        return Block(own, None, pending)

    def finish(self, columns: slice, errors: torch.Tensor, before: torch.Tensor) -> None:
        """See Solver."""
        self._errors[columns] += errors


def blocks_of(width: int) -> Iterator[slice]:
    """Columns, so many at once."""
    for begin in range(0, width, COLUMNS_AT_ONCE):
        yield slice(begin, min(begin + COLUMNS_AT_ONCE, width))


def _factorise(hessian: torch.Tensor, ridge: float) -> dict[int, torch.Tensor] | None:
    """Replace the upper triangle of ``hessian`` [in, in] plus ``ridge`` by R, or leave all as it is. Returns
    the blocks on the diagonal as they were with it, by their first column.
    """
    kept: dict[int, torch.Tensor] = {}
    for columns in reversed(list(blocks_of(len(hessian)))):
        own = hessian[columns, columns]
        kept[columns.start] = own.clone()
        own.diagonal().add_(ridge)
        panel = _without_later(hessian, hessian, columns)
        factor = upper_factor(own)
        if factor is None:
            _restore(hessian, kept)
            return None
        own.copy_(factor)
        above = panel[: columns.start]
        above.copy_(divide(above, factor))
    for own in kept.values():
        own.diagonal().add_(ridge)
    return kept


def _turn(shift: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The strict upper triangle of ``shift`` R^-T, in place; what is below the blocks is not read."""
    for columns in reversed(list(blocks_of(len(shift)))):
        panel = _without_later(shift, factor, columns)
        panel.copy_(divide(panel, factor[columns, columns]))
        panel[columns].triu_(1)
    return shift


def _without_later(matrix: torch.Tensor, factor: torch.Tensor, columns: slice) -> torch.Tensor:
    """``columns`` of ``matrix``, down to their last, less what the later columns stand for."""
    end = columns.stop
    panel = matrix[:end, columns]
    if end < len(matrix):
        panel.addmm_(matrix[:end, end:], factor[columns, end:].T, alpha=-1)
    return panel


def _restore(hessian: torch.Tensor, kept: dict[int, torch.Tensor]) -> None:
    for begin, own in kept.items():
        end = begin + len(own)
        hessian[begin:end, begin:end] = own
        hessian[:begin, begin:end] = hessian[begin:end, :begin].T


def upper_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """R, upper triangular, with R R^T = ``matrix``; None when it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    return None if failed else lower.flip(0, 1)


def divide(panel: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``panel`` R^-T."""
    return torch.linalg.solve_triangular(factor.T, panel, upper=False, left=False)
