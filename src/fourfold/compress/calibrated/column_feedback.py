"""What the rounding of earlier columns asks of later ones, by one Cholesky factor and no inverse.

GPTQ takes U, the upper Cholesky factor of H^-1. With H = R R^T and R upper triangular, U is R^-1, and its
sums over errors become sums over differences: before column k is rounded it stands at

    c_k = w_k + (sum_{j<k} (w_j - q_j) R_jk + sum_{j<k} c_j T_jk) / R_kk

with the original weights w and the rounded ones q. T, the strict upper triangle of a (X0 - X)^T X R^-T / n,
is the pull of GPTAQ (its a triu(S U^T, 1) U, once triangular solves cancel). R and T are made block by block
from the last column to the first.

``DenseFeedback`` does so inside the two [in, in] matrices, in in^3 / 6 multiply-adds each, and per row of
weights in^2 / 2 each. ``TokenFeedback`` is for n tokens, far fewer than inputs: H = ridge + X^T X is never
formed. The Schur complement of block b is ridge + X_b^T M X_b, M = (1 + X_later X_later^T / ridge)^-1 being
[n, n], and with G_b = M X_b R_bb^-T the columns are R_:b = X^T G_b and T_:b = a (X0 - X)^T G_b. That costs
2 n^2 in for the factor, 3 n in per row, and memory for n inputs. M is lowered step by step, in float64.
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


class Feedback(Protocol):
    """Asked and told block by block, from the first column to the last."""

    def diagonal(self) -> torch.Tensor:
        """R_jj [in]."""
        ...

    def block(self, columns: slice) -> Block:
        """What the finished columns ask of ``columns``; valid until the next block is asked for."""
        ...

    def finish(self, columns: slice, errors: torch.Tensor, before: torch.Tensor) -> None:
        """``errors`` w - q and ``before`` c, [b, out], of ``columns``."""
        ...


class DenseFeedback:
    """From R in the upper triangle of ``factor`` [in, in], and ``shift`` [in, in], a (X0 - X)^T X / n, of
    which T is made in place.
    """

    def __init__(self, factor: torch.Tensor, shift: torch.Tensor | None):
        self._factor = factor
        self._pull = None if shift is None else _turn(shift, factor)
        self._errors: torch.Tensor | None = None
        self._before: torch.Tensor | None = None

    @classmethod
    def make(cls, hessian: torch.Tensor, shift: torch.Tensor | None, ridge: float) -> "DenseFeedback | None":
        """None, with ``hessian`` as it was, when it is not positive definite with ``ridge`` added."""
        return cls(hessian, shift) if _factorise(hessian, ridge) else None

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


class TokenFeedback:
    """From the inputs ``x`` [n, in], divided by sqrt(n), and ``shift``, a (X0 - X) [n, in], likewise."""

    def __init__(
        self,
        x: torch.Tensor,
        shift: torch.Tensor | None,
        turned: torch.Tensor,
        factors: dict[int, torch.Tensor],
    ):
        self._x, self._shift, self._turned, self._factors = x, shift, turned, factors
        self._sums: torch.Tensor | None = None
        self._pending: torch.Tensor | None = None

    @classmethod
    def make(cls, x: torch.Tensor, shift: torch.Tensor | None, ridge: float) -> "TokenFeedback | None":
        """None when a Schur complement is not positive definite."""
        left = torch.eye(len(x), dtype=torch.float64, device=x.device)
        turned, factors = torch.empty_like(x), {}
        for columns in reversed(list(blocks_of(x.shape[-1]))):
            own = x[:, columns].double()
            seen = left @ own
            complement = own.T @ seen
            complement.diagonal().add_(ridge)
            factor = _upper_factor(complement)
            if factor is None:
                return None
            seen = _divide(seen, factor)
            left.addmm_(seen, seen.T, alpha=-1)
            turned[:, columns] = seen
            factors[columns.start] = factor.to(x.dtype)
        return cls(x, shift, turned, factors)

    def diagonal(self) -> torch.Tensor:
        """See Feedback."""
        return torch.cat(
            [self._factors[columns.start].diagonal() for columns in blocks_of(self._x.shape[-1])]
        )

    def block(self, columns: slice) -> Block:
        """See Feedback."""
        turned = self._turned[:, columns]
        pull = None if self._shift is None else (self._shift[:, columns].T @ turned).triu_(1)
        pending = None
        if self._sums is not None and self._pending is not None:
            pending = torch.mm(turned.T, self._sums, out=self._pending[: turned.shape[-1]])
        return Block(self._factors[columns.start], pull, pending)

    def finish(self, columns: slice, errors: torch.Tensor, before: torch.Tensor) -> None:
        """See Feedback."""
        if columns.stop == self._x.shape[-1]:
            return
        if self._sums is None:
            self._sums = errors.new_zeros(len(self._x), errors.shape[-1])
            self._pending = torch.empty_like(errors)
        self._sums.addmm_(self._x[:, columns], errors)
        if self._shift is not None:
            self._sums.addmm_(self._shift[:, columns], before)


def blocks_of(width: int) -> Iterator[slice]:
    """Columns, so many at once."""
    for begin in range(0, width, COLUMNS_AT_ONCE):
        yield slice(begin, min(begin + COLUMNS_AT_ONCE, width))


def _factorise(hessian: torch.Tensor, ridge: float) -> bool:
    """Replace the upper triangle of ``hessian`` [in, in] plus ``ridge`` by R, or leave all as it is."""
    kept: dict[int, torch.Tensor] = {}
    for columns in reversed(list(blocks_of(len(hessian)))):
        own = hessian[columns, columns]
        kept[columns.start] = own.clone()
        own.diagonal().add_(ridge)
        panel = _without_later(hessian, hessian, columns)
        factor = _upper_factor(own)
        if factor is None:
            _restore(hessian, kept)
            return False
        own.copy_(factor)
        above = panel[: columns.start]
        above.copy_(_divide(above, factor))
    return True


def _turn(shift: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The strict upper triangle of ``shift`` R^-T, in place; what is below the blocks is not read."""
    for columns in reversed(list(blocks_of(len(shift)))):
        panel = _without_later(shift, factor, columns)
        panel.copy_(_divide(panel, factor[columns, columns]))
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


def _upper_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """R, upper triangular, with R R^T = ``matrix``; None when it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    return None if failed else lower.flip(0, 1)


def _divide(panel: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``panel`` R^-T."""
    return torch.linalg.solve_triangular(factor.T, panel, upper=False, left=False)
