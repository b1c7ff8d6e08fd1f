"""MXFP8, three mantissa bits: 32 E4M3 values and an E8M0 scale, 8.25 bits (OCP MX v1.0 section 5.3.1)."""

from fourfold.formats.numbers.element import E4M3
from fourfold.formats.numbers.mx import mx_format

FORMAT = mx_format("mxfp8-e4m3", E4M3)
