"""MXFP4 in 16-bit integer arithmetic: the same bits as the plain form, an order of magnitude sooner.

The upper half of a float32 (a bfloat16) decides every rounding here if its last bit also tells whether
anything lay below it (rounding to odd), since all thresholds have at most three significant bits. Taking the
block's exponent from such a pattern divides by the scale, and E2M1's thresholds

    0.25< 0.75<= 1.25< 1.75<= 2.5< 3.5<= 5<

are then the patterns 16000 16192 | 16288 16352 16416 16480 16544. The last five lie halfway on a grid of 64,
where ties to even are three operations; ``_round`` moves the first two, which belong to the subnormals, onto
the same grid. The price: parts with NaN, Inf, or scales so small that float32 subnormals matter are left to
the plain form.
"""

import sys

import torch

from fourfold.formats.numbers.element import E2M1
from fourfold.formats.numbers.scale import NAN_BYTE, ScaleRule, shared_exponent_byte

SMALLEST_BYTE = 3  # below it, a float32 subnormal can be a quarter of the scale or more


def quantize_runs(runs: torch.Tensor, rule: ScaleRule) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Packed codes [n, 16] and E8M0 bytes [n] of contiguous runs [n, 32]; None asks for the plain form."""
    if rule is ScaleRule.MSE or sys.byteorder != "little":
        return None
    patterns = _bfloat16_patterns(runs)
    magnitude = patterns & 0x7FFF
    amax = magnitude.amax(-1)
    byte = shared_exponent_byte(amax.view(torch.bfloat16), E2M1, rule)
    small = byte < SMALLEST_BYTE
    if ((small & (amax > 0)) | (byte == NAN_BYTE)).any():
        return None
    exponent = (byte.to(torch.int16) - 127).masked_fill_(small, 0)
    codes = _round(magnitude.sub_((exponent << 7)[:, None]))
    codes |= (patterns >> 15).bitwise_and_(8)
    return _pack_pairs(codes), byte


def _bfloat16_patterns(runs: torch.Tensor) -> torch.Tensor:
    """Int16 patterns [n, 32], rounded to odd."""
    if runs.dtype == torch.bfloat16:
        return runs.view(torch.int16)
    bits = runs.float().view(torch.int32)
    sticky = (bits & 0xFFFF).add_(0xFFFF).bitwise_right_shift_(16)
    return sticky.bitwise_or_(bits >> 16).to(torch.int16)


def _round(y: torch.Tensor) -> torch.Tensor:
    """E2M1 magnitude codes 0..7 (int16) of bfloat16 patterns ``y`` of non-negative scaled values."""
    half_up = (y + 32).clamp_max_(16288)  # 0.75, at 16192, belongs at 16224
    quarter_up = (y + 160).clamp_(16160, 16161)  # what passes 0.25, at 16000, passes 16160
    grid = y.clamp_min_(0)
    torch.maximum(grid, half_up, out=grid)
    torch.maximum(grid, quarter_up, out=grid)
    tie_up = (grid >> 6).bitwise_and_(1)
    return grid.add_(tie_up).add_(31).bitwise_right_shift_(6).sub_(252).clamp_max_(7)


def _pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two int16 codes, read as one int32, become a byte with the first in the low nibble."""
    pairs = codes.view(torch.int32)
    return (pairs >> 12).bitwise_or_(pairs).bitwise_and_(255).to(torch.uint8)
