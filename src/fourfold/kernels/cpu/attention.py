"""Causal attention over a paged KV cache in C++; cpp/attention.h says what it computes and in which order.

One layer's cache is [blocks, block_size, 2 * kv_heads, head_dim], keys' heads first, in bfloat16, float32, or
FP8 E4M3 as uint8 with one float32 scale per head. Spans say whose queries these are: row, count and start of
each sequence's tokens of this step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.kernels.cpu import native


@dataclass(frozen=True)
class Softmax:
    """How scores become weights: ``scale``; tanh softcap, window in positions (0: none); a sink per head."""

    scale: float
    softcap: float = 0.0
    window: int = 0
    sinks: Tensor | None = None


def attend(
    q: Tensor,
    cache: Tensor,
    spans: Tensor,
    tables: Tensor,
    softmax: Softmax,
    kv_scales: Tensor | None = None,
    isa: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """q float32 [T, heads, D] over ``cache`` -> ``out``, like q; rows of no span stay as they are.

    spans int64 [n, 3] (row, count, start), tables int32 [n, most blocks], kv_scales float32 [2 * kv_heads].
    Raises ValueError for shapes, types and blocks that do not fit.
    """
    assert native is not None
    out = torch.empty_like(q) if out is None else out
    _, block_size, heads2, width = cache.shape
    native.attention(
        q.flatten(1),
        cache.flatten(1),
        spans,
        tables,
        out.flatten(1),
        heads2 // 2,
        width,
        block_size,
        softmax.scale,
        softmax.softcap,
        softmax.window,
        None if kv_scales is None else kv_scales[None],
        None if softmax.sinks is None else softmax.sinks[None],
        isa,
    )
    return out


def write(
    kv: Tensor, cache: Tensor, slots: Tensor, kv_scales: Tensor | None = None, isa: str = "auto"
) -> None:
    """kv float32 [T, 2 * kv_heads, D] into ``cache`` at slots int32 [T]: block * block_size + offset.

    bfloat16 is rounded to nearest even, E4M3 likewise and saturating at +-448 times the scale.
    """
    assert native is not None
    _, _, heads2, width = cache.shape
    scales = None if kv_scales is None else kv_scales[None]
    native.write_kv(kv.flatten(1), cache.flatten(1), slots[None], heads2 // 2, width, scales, isa)
