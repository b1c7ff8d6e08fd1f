"""INT4, symmetric (-8..7): 64 values to a float16 scale, 4.25 bits a value."""

from fourfold.formats.numbers.element import INT4
from fourfold.formats.numbers.scaled import ScaledFormat

FORMAT = ScaledFormat("int4-g64", INT4, 64, "fp16", reach=7.5)
