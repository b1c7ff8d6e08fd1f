"""FP8 E4M3 with a float32 scale for each token, a row of an activation [tokens, K]."""

from fourfold.formats.numbers.element import E4M3
from fourfold.formats.numbers.scaled import ScaledFormat

FORMAT = ScaledFormat("fp8-token", E4M3, None, "fp32")
