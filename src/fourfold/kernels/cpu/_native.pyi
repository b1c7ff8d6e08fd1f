"""The C++ extension: see cpp/module.cpp. Tensors are contiguous, on the CPU; ValueError, TypeError else."""

from torch import Tensor

def mxfp4_linear(x: Tensor, blocks: Tensor, scales: Tensor, out: Tensor, isa: str = "auto") -> None:
    """out [m, n] = x [m, k] times W [n, k] transposed; x and out both float32 or both bfloat16."""

def mxfp4_expand(blocks: Tensor, scales: Tensor, out: Tensor, isa: str = "auto") -> None:
    """out [n, k] (float32 or bfloat16) = the values of W."""

def cpu_features() -> dict[str, bool]: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
