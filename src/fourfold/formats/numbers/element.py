"""Element formats: the few bits of one value, before its block's scale.

A float element with ``E`` exponent and ``M`` mantissa bits is sign, exponent, mantissa from high to low, with
bias ``2^(E-1) - 1`` and subnormals (OCP MX v1.0 section 5.3; OCP OFP8 v1.0 for E4M3 and E5M2). An integer
element (``E = 0``) is a two's complement number of ``2^-M`` steps; INT8's most negative code is read but
never written, so that its range stays symmetric (OCP MX v1.0 section 5.3.4).

Rounding is to nearest, ties to even, saturating at the largest finite value; the sign of zero is kept where
the format has one. The price of the plain form is about ten passes over the data; ``fp4`` has a lean one.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class ElementFormat:
    """``bits`` per value, split as above; ``max`` is the largest finite value that is ever written.

    ``lowest`` is the most negative one where that is not ``-max``.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    max: float
    lowest: float | None = None

    @property
    def is_integer(self) -> bool:
        """True for two's complement elements."""
        return self.exponent_bits == 0

    @property
    def max_exponent(self) -> int:
        """``floor(log2(max))``: emax of OCP MX v1.0 section 6.3."""
        return math.frexp(self.max)[1] - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; 0 for integers."""
        return 0 if self.is_integer else 2 - 2 ** (self.exponent_bits - 1)

    @property
    def min(self) -> float:
        """The smallest positive value."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    def step(self, values: torch.Tensor) -> torch.Tensor:
        """Float32 distance between neighbours of the grid at ``values`` (float32); beyond the
        grid, of its ends. At a power of two it is the distance to the neighbour away from zero.
        """
        if self.is_integer:
            return torch.full_like(values, self.min)
        return self._step(values.clamp(-self.max, self.max))

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Float32 ``values`` in units of the scale, rounded to the element's grid: ``decode(encode(values))``
        in seven operations. NaN stays NaN; the sign of zero is kept.
        """
        if self.is_integer:
            low = -self.max if self.lowest is None else self.lowest
            return (values / self.min).round_().mul_(self.min).clamp_(low, self.max)
        clipped = values.clamp(-self.max, self.max)
        step = self._step(clipped)
        return clipped.div_(step).round_().mul_(step)

    def _step(self, clipped: torch.Tensor) -> torch.Tensor:
        smallest = (127 + self.min_exponent) << 23
        power = (clipped.view(torch.int32) & 0x7F800000).clamp_min_(smallest)
        return power.sub_(self.mantissa_bits << 23).view(torch.float32)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Codes (uint8, same shape, unused high bits zero) of finite float32 ``values``."""
        if self.is_integer:
            steps = (values * 2.0**self.mantissa_bits).round_()
            low, high = (limit * 2.0**self.mantissa_bits for limit in (self.lowest or -self.max, self.max))
            return steps.clamp_(low, high).to(torch.int8).view(torch.uint8) & (2**self.bits - 1)
        magnitude = values.abs().clamp_max_(self.max)
        smallest = (127 + self.min_exponent) << 23
        power = (magnitude.view(torch.int32) & 0x7F800000).clamp_min_(smallest)
        steps = magnitude.div_(power.view(torch.float32)).mul_(2.0**self.mantissa_bits).round_()
        # a mantissa that rounds up to 2 carries into the exponent field by itself
        code = power.sub_(smallest).bitwise_right_shift_(23 - self.mantissa_bits).add_(steps.to(torch.int32))
        sign = (values.contiguous().view(torch.int32) >> 31).bitwise_and_(1 << (self.bits - 1))
        return code.bitwise_or_(sign).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Float32 values of uint8 ``codes``; what lies beyond ``max`` in a float is Inf or NaN."""
        return value_table(self).to(codes.device)[codes.int()]


@cache
def value_table(element: ElementFormat) -> torch.Tensor:
    """The float32 value of every code, [2^bits]."""
    return torch.tensor([_value(element, code) for code in range(2**element.bits)])


def _value(element: ElementFormat, code: int) -> float:
    half, fraction = 2 ** (element.bits - 1), 2**element.mantissa_bits
    if element.is_integer:
        return (code - 2 * half if code >= half else code) / fraction
    sign, field, mantissa = -1.0 if code >= half else 1.0, code % half // fraction, code % fraction
    significand = mantissa / fraction + (field > 0)
    value = math.ldexp(significand, max(field, 1) - 1 + element.min_exponent)
    if value > element.max:
        value = math.nan if mantissa else math.inf
    return sign * value


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Exact float32 ``2^exponent`` for int32 exponents in [-127, 127]; -127 is subnormal."""
    bits = (exponent + 127) << 23
    return bits.masked_fill_(exponent == -127, 1 << 22).view(torch.float32)


E2M1 = ElementFormat("e2m1", 4, 2, 1, 6.0)
E2M3 = ElementFormat("e2m3", 6, 2, 3, 7.5)
E3M2 = ElementFormat("e3m2", 6, 3, 2, 28.0)
E4M3 = ElementFormat("e4m3", 8, 4, 3, 448.0)
E5M2 = ElementFormat("e5m2", 8, 5, 2, 57344.0)
INT8 = ElementFormat("int8", 8, 0, 6, 127 / 64)
INT4 = ElementFormat("int4", 4, 0, 0, 7.0, -8.0)
