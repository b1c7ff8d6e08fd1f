"""INT4, symmetric (-8..7): 32 values to a float16 scale, 4.5 bits a value."""

from fourfold.formats.numbers.element import INT4
from fourfold.formats.numbers.scaled import ScaledFormat

FORMAT = ScaledFormat("int4-g32", INT4, 32, "fp16", reach=7.5)
