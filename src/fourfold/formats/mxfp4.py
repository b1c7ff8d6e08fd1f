"""MXFP4: 32 E2M1 values and an E8M0 scale, 4.25 bits a value (OCP MX v1.0 section 5.3.3)."""

from fourfold.formats.numbers.element import E2M1
from fourfold.formats.numbers.mx import mx_format

FORMAT = mx_format("mxfp4", E2M1)
