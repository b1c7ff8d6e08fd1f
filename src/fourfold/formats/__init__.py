"""Numbers and bytes: what a format holds, how a tensor is rounded to it, and how its bytes lie.

Everything here is plain torch and is the specification that kernels are tested against. One module per
format, named as on the command line, exports ``FORMAT``; the arithmetic they share is in ``numbers``.
"""

from fourfold.formats.numbers.block import BlockFormat, BlockTensor
from fourfold.formats.numbers.element import ElementFormat
from fourfold.formats.numbers.registry import format_names, get_format
from fourfold.formats.numbers.rotation import ROTATION_SIZE, hadamard, hadamard_signs, turn
from fourfold.formats.numbers.scale import ScaleRule

__all__ = [
    "ROTATION_SIZE",
    "BlockFormat",
    "BlockTensor",
    "ElementFormat",
    "ScaleRule",
    "format_names",
    "get_format",
    "hadamard",
    "hadamard_signs",
    "turn",
]
