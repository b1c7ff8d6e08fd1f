"""The power-of-two scale that a block shares (E8M0: a byte, the exponent + 127; 0xFF is NaN).

With ``amax = m * 2^f`` (``1 <= m < 2``) and an element whose largest value is ``max = M * 2^emax``, every
rule gives the exponent ``f - emax`` or one more (OCP MX v1.0 section 6.3 is FLOOR). One is added when

- FLOOR: never. Values up to twice ``2^emax`` saturate at ``max``.
- EVEN:  ``m >= 2 - 2^-(mantissa_bits + 1)``: amax, rounded to the element's mantissa, reaches ``2^(f+1)``.
  This is what AMD Quark and compressed-tensors write for E2M1 (``m >= 1.75``).
- RCEIL: ``m > M``: the smallest scale under which nothing saturates.
- CEIL:  ``m > 1``: no value exceeds ``2^emax``.
- MSE:   the squared error of the block is smaller so (a tie keeps the smaller scale).

The exponent is clamped to [-127, 127]. ``f`` and ``m`` come from the bits of amax as a float64, where every
float32 is normal: ``floor(log2(x))`` in float32 is wrong one unit below a power of two. A block of zeros gets
the smallest scale, byte 0. A block with a NaN or Inf gets byte 0xFF, which makes all of it NaN.
"""

from enum import StrEnum

import torch

from fourfold.formats.numbers.element import ElementFormat, power_of_two

NAN_BYTE = 255
FRACTION_BITS = 52


class ScaleRule(StrEnum):
    """How a block's shared exponent follows from its largest magnitude."""

    FLOOR = "floor"
    EVEN = "even"
    RCEIL = "rceil"
    CEIL = "ceil"
    MSE = "mse"


def shared_exponent_byte(amax: torch.Tensor, element: ElementFormat, rule: ScaleRule) -> torch.Tensor:
    """E8M0 bytes (uint8) for float ``amax`` >= 0 by any rule but MSE, for which this is FLOOR's."""
    bits = amax.double().view(torch.int64)
    field = bits >> FRACTION_BITS
    exponent = field - (1023 + element.max_exponent)
    exponent += (bits & (2**FRACTION_BITS - 1)) >= smallest_fraction_added(element, rule)
    byte = exponent.clamp_(-127, 127) + 127
    return byte.masked_fill_(field == 2047, NAN_BYTE).to(torch.uint8)


def smallest_fraction_added(element: ElementFormat, rule: ScaleRule) -> int:
    """The smallest ``(m - 1) * 2^52`` at which ``rule`` adds one to the exponent; 2^52 is never."""
    one = 2**FRACTION_BITS
    if rule is ScaleRule.EVEN:
        return one - (one >> (element.mantissa_bits + 1))
    if rule is ScaleRule.RCEIL:
        return int((element.max / 2.0**element.max_exponent - 1) * one) + 1
    return 1 if rule is ScaleRule.CEIL else one


def byte_to_scale(byte: torch.Tensor) -> torch.Tensor:
    """Float32 ``2^(byte - 127)``; NaN for 0xFF."""
    return power_of_two(byte.int() - 127).masked_fill_(byte == NAN_BYTE, torch.nan)


def byte_to_inverse(byte: torch.Tensor) -> torch.Tensor:
    """Float32 ``2^(127 - byte)``; 0 for 0xFF, so that finite values of such a block are coded as zeros."""
    return power_of_two((127 - byte.int()).clamp_min_(-127)).masked_fill_(byte == NAN_BYTE, 0)
