"""MXFP4 weights on a CPU: the C++ kernel for few rows of x, expansion and torch's product for many.

Few rows are bound by reading the weight, 4.25 bits a value against bfloat16's 16; many are bound by
multiplications, where torch's library is hard to beat and the expansion is a small share of the time.
"""

import math
import threading

import torch

from fourfold.formats import BlockTensor
from fourfold.kernels import expanded
from fourfold.kernels.cpu import cpu_features, native
from fourfold.kernels.dispatch import LinearKernel

# Up to how many rows of x the C++ kernel is the faster way, by the dtype of x and the instruction set:
# measured with benchmarks/kernels/mxfp4_linear.py on a Zen 4. Near the border the two are close.
MOST_ROWS = {
    torch.bfloat16: {"portable": 4, "avx512": 16, "avx512bf16": 32},
    torch.float32: {"portable": 4, "avx512": 32, "avx512bf16": 32},
}


def takes(x: torch.Tensor, w: BlockTensor) -> bool:
    """On the CPU with the extension, and packed as the format says."""
    return (
        native is not None
        and x.device.type == "cpu"
        and w.blocks.is_contiguous()
        and w.scales.is_contiguous()
    )


def run(x: torch.Tensor, w: BlockTensor) -> torch.Tensor:
    """``x`` [M, K] contiguous times ``w`` [N, K] transposed, [M, N]."""
    if len(x) > MOST_NATIVE_ROWS[x.dtype]:
        return expanded.linear(x, w, expand)
    return multiply(x, w)


def multiply(x: torch.Tensor, w: BlockTensor, isa: str = "auto") -> torch.Tensor:
    """``x`` [M, K] contiguous times ``w`` [N, K] transposed in C++, whatever M is; no gradients."""
    assert native is not None
    out = x.new_empty(len(x), len(w.blocks))
    native.mxfp4_linear(x, w.blocks, w.scales, out, isa)
    return out


def expand(w: BlockTensor, dtype: torch.dtype, isa: str = "auto") -> torch.Tensor:
    """The values of ``w`` [N, K] in float32 or bfloat16, both exact, made by C++.

    The result lies in a buffer that this thread's next call overwrites: fresh memory of this size would come
    from the system page by page, which takes longer than filling it.
    """
    assert native is not None
    shape = (len(w.blocks), w.blocks.shape[1] * 2)
    out = _buffer(math.prod(shape), dtype).view(shape)
    native.mxfp4_expand(w.blocks, w.scales, out, isa)
    return out


_local = threading.local()


def _buffer(values: int, dtype: torch.dtype) -> torch.Tensor:
    held: dict[torch.dtype, torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    if dtype not in held or held[dtype].numel() < values:
        held[dtype] = torch.empty(max(values, expanded.SLICE_VALUES), dtype=dtype)
    return held[dtype][:values]


USABLE = [name for name, usable in cpu_features().items() if usable]
MOST_NATIVE_ROWS = {
    dtype: max((rows[name] for name in USABLE), default=0) for dtype, rows in MOST_ROWS.items()
}

KERNEL = LinearKernel("mxfp4", takes, run)
