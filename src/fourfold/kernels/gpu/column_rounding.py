"""GPTQ's rounding of up to 128 columns on a GPU: a program holds what some rows' columns are in registers.

:mod:`fourfold.compress.calibrated.column_rounding` says what is computed. Contract: ``turned`` [b, out],
``multipliers`` [blocks, out] (both contiguous), ``factor``, ``pull`` [b, b] and ``pending`` [b, out] float32,
``blocks`` int64 [b], all on one GPU. Price: each column is found by a sum over all of them, as registers
cannot be indexed.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # comes with torch for GPUs
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from fourfold.formats import ElementFormat
from fourfold.kernels.gpu.feedback import ROUNDER

ROWS = 32  # of a program
EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def _round(
    turned,
    multipliers,
    blocks,
    reach,
    pull,
    start,
    errors,
    before,
    rows,
    lowest,
    largest,
    step,
    smallest,
    carry,
    count: tl.constexpr,
    rows_at_once: tl.constexpr,
    columns_at_once: tl.constexpr,
    has_pull: tl.constexpr,
    is_integer: tl.constexpr,
):
    row = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once)
    column = tl.arange(0, columns_at_once)
    inside = row < rows
    place = column[:, None] * rows + row[None, :]
    c = tl.load(start + place, mask=(column < count)[:, None] & inside[None, :], other=0.0)
    for j in range(count):
        own = tl.sum(tl.where((column == j)[:, None], c, 0.0), 0)
        scale = tl.load(multipliers + tl.load(blocks + j) * rows + row, mask=inside, other=1.0)
        q = tl.minimum(tl.maximum(tl.div_rn(own, scale), lowest), largest)
        if is_integer:
            q = ((tl.div_rn(q, step) + ROUNDER) - ROUNDER) * step
        else:
            power = tl.maximum(q.to(tl.int32, bitcast=True) & EXPONENT, smallest)
            carried = power.to(tl.float32, bitcast=True) * carry
            q = (q + carried) - carried
        q = q * scale
        at = j * rows + row
        error = tl.load(turned + at, mask=inside, other=0.0) - q
        tl.store(turned + at, q, mask=inside)
        tl.store(errors + at, error, mask=inside)
        tl.store(before + at, own, mask=inside)
        later = (column > j) & (column < count)
        c += tl.load(reach + j * count + column, mask=later, other=0.0)[:, None] * error[None, :]
        if has_pull:
            c += tl.load(pull + j * count + column, mask=later, other=0.0)[:, None] * own[None, :]


def round_columns(
    turned: Tensor,
    multipliers: Tensor,
    blocks: Tensor,
    factor: Tensor,
    pull: Tensor | None,
    pending: Tensor | None,
    element: ElementFormat,
) -> tuple[Tensor, Tensor]:
    """Round ``turned`` in place; its errors w - q and what it was before, [b, out] each."""
    (count, rows), diagonal = turned.shape, factor.diagonal()
    reach, pulls = (None if m is None else (m / diagonal).contiguous() for m in (factor, pull))
    start = turned if pending is None else torch.addcdiv(turned, pending, diagonal[:, None])
    errors, before = torch.empty_like(turned), torch.empty_like(turned)
    lowest = -element.max if element.lowest is None else element.lowest
    smallest, carry = 0, 0.0
    if not element.is_integer:
        smallest, carry = (127 + element.min_exponent) << 23, 1.5 * 2.0 ** (23 - element.mantissa_bits)
    kernel: Any = _round
    kernel[(triton.cdiv(rows, ROWS),)](
        turned,
        multipliers,
        blocks,
        reach,
        reach if pulls is None else pulls,
        start,
        errors,
        before,
        rows,
        lowest,
        element.max,
        element.min,
        smallest,
        carry,
        count,
        ROWS,
        max(32, triton.next_power_of_2(count)),
        pulls is not None,
        element.is_integer,
        num_warps=4,
    )
    return errors, before
