"""MXFP6, three mantissa bits: 32 E2M3 values and an E8M0 scale, 6.25 bits (OCP MX v1.0 section 5.3.2)."""

from fourfold.formats.numbers.element import E2M3
from fourfold.formats.numbers.mx import mx_format

FORMAT = mx_format("mxfp6-e2m3", E2M3)
