"""MXINT8: 32 integers of 1/64 steps and an E8M0 scale, 8.25 bits a value (OCP MX v1.0 section 5.3.4)."""

from fourfold.formats.numbers.element import INT8
from fourfold.formats.numbers.mx import mx_format

FORMAT = mx_format("mxint8", INT8)
