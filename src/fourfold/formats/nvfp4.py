"""NVFP4: 16 E2M1 values, an E4M3 scale and a float32 scale a tensor, 4.5 bits a value (NVIDIA)."""

from fourfold.formats.numbers.element import E2M1
from fourfold.formats.numbers.scaled import TwoLevelFormat

FORMAT = TwoLevelFormat("nvfp4", E2M1, 16, "e4m3")
