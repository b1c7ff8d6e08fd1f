"""The specification of ``linear``: what every kernel is tested against, in plain torch on any device.

    y = cast(activation(x) @ dequantize(w)^T)

The activation is rounded to its format and read back (W4A8, W4A6, W4A4 with an MXFP4 weight; None is A16),
both factors are float32, products are summed in float32, and the sum is rounded once to the dtype of ``x``.
For MX formats this is exact emulation: every product of two codes and two scales is a float32, so a machine
with such units differs only in the order of its sums. The price: float32 speed, and a weight that is read
back on every call, a slice of rows at a time, so that it stays packed in memory.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from fourfold.formats import BlockTensor, get_format

SLICE_VALUES = 2**20


def linear(x: torch.Tensor, w: BlockTensor | torch.Tensor, activation: str | None = None) -> torch.Tensor:
    """``x`` [..., K] (bfloat16 or float32) times ``w`` [N, K] transposed: [..., N] in the dtype of ``x``.

    ``activation`` is a format name, or None to leave ``x`` as it is. Raises UsageError for an unknown format
    and FourfoldError for a K that the format cannot hold.
    """
    values = activate(x.float(), activation).reshape(-1, x.shape[-1])
    out = torch.empty(len(values), w.shape[0], dtype=torch.float32, device=x.device)
    for rows in row_slices(w.shape[0], x.shape[-1], SLICE_VALUES):
        torch.matmul(values, read_rows(w, rows).T, out=out[:, rows])
    return out.to(x.dtype).reshape(*x.shape[:-1], w.shape[0])


def activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """What ``x`` becomes in the format ``activation``, in the dtype of ``x``."""
    return x if activation is None else get_format(activation).fake_quantize(x)


def round_to_int8_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K] (float32) as int8 codes [..., K] and float32 scales [..., K/32], ties to even.

    What the int8 arithmetic of packed weights does to its inputs. A scale is the smallest of 9/8, 5/4, 3/2
    and 2 times a power of two that is amax/127 or more: kernels apply it with a shift. A block smaller
    than 2^-60 becomes zeros under the scale 0, and one that holds a NaN or an Inf zeros under the scale NaN.
    """
    blocks = x.unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1)
    usable = (amax >= 2.0**-60) & amax.isfinite()
    fraction, exponent = torch.frexp(torch.where(usable, amax / 127, 1.0))
    steps = torch.tensor([1 / 2, 9 / 16, 5 / 8, 3 / 4, 1], device=x.device)
    scales = torch.ldexp(steps[torch.bucketize(fraction, steps)], exponent)
    codes = torch.where(usable[..., None], blocks * (1 / scales)[..., None], 0.0).round()
    scales = torch.where(usable, scales, torch.where(amax.isfinite(), 0.0, torch.nan))
    return codes.to(torch.int8).flatten(-2), scales


def read_int8_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values [..., K] of ``round_to_int8_blocks``."""
    return (codes.unflatten(-1, (-1, 32)).float() * scales[..., None]).flatten(-2)


def row_slices(n: int, k: int, values: int) -> Iterator[slice]:
    """Slices over the rows of an [n, k] matrix, each of at most ``values`` values or one row."""
    step = max(1, values // max(1, k))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def slice_rows(w: BlockTensor, rows: slice) -> BlockTensor:
    """Some rows of ``w`` without copying; a scale that the whole tensor shares goes with each."""
    return replace(w, blocks=w.blocks[rows], scales=w.scales[rows] if w.scales.ndim else w.scales)


def read_rows(w: BlockTensor | torch.Tensor, rows: slice) -> torch.Tensor:
    """Some rows of ``w`` as float32."""
    return slice_rows(w, rows).dequantize() if isinstance(w, BlockTensor) else w[rows].float()
