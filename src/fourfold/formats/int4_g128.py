"""INT4, symmetric (-8..7): 128 values to a float16 scale, 4.125 bits a value."""

from fourfold.formats.numbers.element import INT4
from fourfold.formats.numbers.scaled import ScaledFormat

FORMAT = ScaledFormat("int4-g128", INT4, 128, "fp16", reach=7.5)
