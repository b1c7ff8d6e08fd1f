"""FP8 E4M3 with a float32 scale for each output channel, a row of a weight [out, in]."""

from fourfold.formats.numbers.element import E4M3
from fourfold.formats.numbers.scaled import ScaledFormat

FORMAT = ScaledFormat("fp8-channel", E4M3, None, "fp32")
