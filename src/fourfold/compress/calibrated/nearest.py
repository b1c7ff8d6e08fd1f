"""Rounding to an element's grid, in place and in few calls.

For a float element, 1.5 * 2^(23 - mantissa_bits) times the power of two at or below a value has the element's
step as its own last bit: added and taken away again, it leaves the nearest multiple of that step, ties to
even. The price: a negative value that becomes zero loses its sign.
"""

import torch

from fourfold.formats import ElementFormat

EXPONENT = 0x7F800000


class Nearest:
    """Rounds float32 tensors of the shape and place of ``like``, in units of the scale."""

    def __init__(self, element: ElementFormat, like: torch.Tensor):
        self._limits = (-element.max if element.lowest is None else element.lowest, element.max)
        self._step = torch.tensor(element.min, device=like.device)
        self._bits = None
        if not element.is_integer:
            # calls with scalars of Python take thrice the time
            smallest, mask = (127 + element.min_exponent) << 23, EXPONENT
            self._smallest, self._mask = torch.tensor([smallest, mask], device=like.device).int().unbind()
            self._carry = torch.tensor(1.5 * 2.0 ** (23 - element.mantissa_bits), device=like.device)
            self._bits = torch.empty_like(like, dtype=torch.int32)
            self._power = self._bits.view(torch.float32)

    def __call__(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """``values`` at the nearest values of the grid, into ``out``. NaN stays NaN."""
        if self._bits is None:
            torch.div(values, self._step, out=out).round_().mul_(self._step).clamp_(*self._limits)
            return
        torch.clamp(values, *self._limits, out=out)
        torch.bitwise_and(out.view(torch.int32), self._mask, out=self._bits)
        torch.maximum(self._bits, self._smallest, out=self._bits)
        torch.mul(self._power, self._carry, out=self._power)
        out.add_(self._power).sub_(self._power)
