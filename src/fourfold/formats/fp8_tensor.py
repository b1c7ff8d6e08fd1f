"""FP8 E4M3 with one float32 scale for the tensor: the plainest 8-bit baseline."""

from fourfold.formats.numbers.element import E4M3
from fourfold.formats.numbers.scaled import TensorScaledFormat

FORMAT = TensorScaledFormat("fp8-tensor", E4M3, None, "fp32")
