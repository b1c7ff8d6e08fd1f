"""Inputs rounded to MXFP4 with feedback, on a GPU: a program holds some rows of one group in registers.

:mod:`fourfold.kernels.feedback` says what is computed. Contract: ``x`` float32 [n, in] and ``steps`` float32
[in / group, group, group], contiguous, on one GPU; the scale rule is EVEN. Price: each of the group's columns
is found by a sum over the row, as registers cannot be indexed.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # comes with torch for GPUs
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROWS = {32: 64, 64: 64, 128: 32}  # of a program: 4096 values in the registers of 128 or 256 threads
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away it rounds to an integer, ties to even
EVEN = tl.constexpr(0x600000)  # the mantissa of 1.75


@triton.jit
def _round(x, steps, out, n, width, rows_at_once: tl.constexpr, group: tl.constexpr):
    rows, columns = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once), tl.arange(0, group)
    first = tl.program_id(1) * group
    place = rows[:, None] * width + first + columns[None, :]
    inside = (rows < n)[:, None]
    left = tl.load(x + place, mask=inside, other=0.0)
    rounded = tl.zeros_like(left)
    scale = tl.full([rows_at_once], 1.0, tl.float32)
    inverse = tl.full([rows_at_once], 1.0, tl.float32)
    for j in range(group):
        if j % 32 == 0:
            own = ((columns >= j) & (columns < j + 32))[None, :]
            bits = tl.max(tl.where(own, tl.abs(left), 0.0), 1).to(tl.int32, bitcast=True)
            exponent = ((bits >> 23) & 255) - 129 + ((bits & 0x7FFFFF) >= EVEN).to(tl.int32)
            exponent = tl.minimum(tl.maximum(exponent, -126), 126)
            scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
            inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        here = (columns == j)[None, :]
        value = tl.sum(tl.where(here, left, 0.0), 1)
        scaled = tl.minimum(tl.maximum(value * inverse, -6.0), 6.0)
        size = tl.abs(scaled)
        step = tl.where(size < 2, 0.5, tl.where(size < 4, 1.0, 2.0))
        nearest = ((scaled / step + ROUNDER) - ROUNDER) * step * scale
        rounded = tl.where(here, nearest[:, None], rounded)
        to_later = tl.load(steps + (first + j) * group + columns)
        left -= (value - nearest)[:, None] * to_later[None, :]
    tl.store(out + place, rounded, mask=inside)


def round_mxfp4(x: Tensor, steps: Tensor) -> Tensor:
    """``x`` rounded, float32 [n, in]."""
    (n, width), group, out = x.shape, steps.shape[-1], torch.empty_like(x)
    grid = (triton.cdiv(n, ROWS[group]), width // group)
    kernel: Any = _round
    kernel[grid](x, steps, out, n, width, ROWS[group], group, num_warps=8 if group == 128 else 4)
    return out
