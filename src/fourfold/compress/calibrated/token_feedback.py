"""Feedback among columns from few tokens, far fewer than inputs: H is never formed.

With the names of :mod:`fourfold.compress.calibrated.column_feedback` and H = ridge + X^T X, the Schur
complement of block b is ridge + X_b^T M X_b, M = (1 + X_later X_later^T / ridge)^-1 being [n, n], and with
G_b = M X_b R_bb^-T the columns are R_:b = X^T G_b and T_:b = a (X0 - X)^T G_b. That costs 2 n^2 in for the
factor, 3 n in per row, and memory for n inputs; a sweep of descent costs 2 n in per row. M is lowered step by
step, in float64.
"""

import torch

from fourfold.compress.calibrated.column_feedback import Block, blocks_of, divide, upper_factor


class TokenFeedback:
    """From the inputs ``x`` [n, in], divided by sqrt(n), and ``shift``, a (X0 - X) [n, in], likewise."""

    def __init__(
        self,
        x: torch.Tensor,
        shift: torch.Tensor | None,
        turned: torch.Tensor,
        factors: dict[int, torch.Tensor],
        ridge: float,
        wanted: torch.Tensor | None,
    ):
        self._x, self._shift, self._turned, self._factors = x, shift, turned, factors
        self._ridge, self._wanted = ridge, wanted
        self._sums: torch.Tensor | None = None
        self._pending: torch.Tensor | None = None

    @classmethod
    def make(
        cls, x: torch.Tensor, shift: torch.Tensor | None, ridge: float, wanted: torch.Tensor | None = None
    ) -> "TokenFeedback | None":
        """None when a Schur complement is not positive definite. ``wanted`` [n, out], what the shift takes
        from the outputs, is for descent alone.
        """
        left = torch.eye(len(x), dtype=torch.float64, device=x.device)
        turned, factors = torch.empty_like(x), {}
        for columns in reversed(list(blocks_of(x.shape[-1]))):
            own = x[:, columns].double()
            seen = left @ own
            complement = own.T @ seen
            complement.diagonal().add_(ridge)
            factor = upper_factor(complement)
            if factor is None:
                return None
            seen = divide(seen, factor)
            left.addmm_(seen, seen.T, alpha=-1)
            turned[:, columns] = seen
            factors[columns.start] = factor.to(x.dtype)
        return cls(x, shift, turned, factors, ridge, wanted)

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

    def descent(self, errors: torch.Tensor) -> "TokenDescent":
        """See Feedback."""
        sums = self._x @ errors
        if self._wanted is not None:
            sums += self._wanted
        return TokenDescent(self._x, self._ridge, errors, sums)


class TokenDescent:
    """Here ``sums`` [n, out] are what every token lacks: X (w - q) and what makes up for the shift."""

    def __init__(self, x: torch.Tensor, ridge: float, errors: torch.Tensor, sums: torch.Tensor):
        self._x, self._ridge, self._errors, self._sums = x, ridge, errors, sums

    def block(self, columns: slice) -> Block:
        """See Solver."""
        x = self._x[:, columns]
        own = x.T @ x
        own.diagonal().add_(self._ridge)
        pending = torch.addmm(self._errors[columns], x.T, self._sums, beta=self._ridge)
        return Block(own, None, pending)

    def finish(self, columns: slice, errors: torch.Tensor, before: torch.Tensor) -> None:
        """See Solver."""
        self._errors[columns] += errors
        self._sums.addmm_(self._x[:, columns], errors)
