"""MXFP8, five exponent bits: 32 E5M2 values and an E8M0 scale, 8.25 bits (OCP MX v1.0 section 5.3.1)."""

from fourfold.formats.numbers.element import E5M2
from fourfold.formats.numbers.mx import mx_format

FORMAT = mx_format("mxfp8-e5m2", E5M2)
