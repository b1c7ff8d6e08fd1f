"""MXFP6, three exponent bits: 32 E3M2 values and an E8M0 scale, 6.25 bits (OCP MX v1.0 section 5.3.2)."""

from fourfold.formats.numbers.element import E3M2
from fourfold.formats.numbers.mx import mx_format

FORMAT = mx_format("mxfp6-e3m2", E3M2)
