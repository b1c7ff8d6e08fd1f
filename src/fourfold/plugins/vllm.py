"""vLLM on a CPU: MXFP4 linear layers by Fourfold's kernel. vLLM has none of its own and refuses such models.

    pip install 'fourfold[vllm]';  vllm serve CHECKPOINT

vLLM calls ``register`` in each of its processes (entry point group ``vllm.general_plugins``), finds the class
by its platform and kernel type, and asks it what it can do. Nothing here imports vLLM but ``register``, so
all of it can be tried without it. The layer's checkpoint tensors are replaced by their packed tiles when a
model has been loaded. To torch.compile the product is one opaque operation, ``fourfold::mxfp4_linear``, in
C++: a call through Python takes as long as a small layer. It is computed by vLLM's own OpenMP threads: these
spin for milliseconds between their uses, and others would get half of each core.

vLLM asks for the same kernel whether a checkpoint rounds activations to MXFP4 or leaves them
(compressed-tensors W4A16 comes with the key of W4A4); like its Marlin kernel on a GPU this one multiplies
weights only, and says so."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch.nn import Parameter

from fourfold.formats import BlockTensor
from fourfold.kernels import native_available, native_problem, set_threads
from fourfold.kernels.cpu import native, share_openmp_threads
from fourfold.kernels.cpu.packed import PackedWeight

library = torch.library.Library("fourfold", "FRAGMENT")
library.define("mxfp4_linear(Tensor x, Tensor tiles, int n) -> Tensor")
if native is not None:
    native.implement_torch_linear(ctypes.CDLL(torch._C.__file__)._handle)


@torch.library.register_fake("fourfold::mxfp4_linear", lib=library)
def mxfp4_linear_shape(x: torch.Tensor, tiles: torch.Tensor, n: int) -> torch.Tensor:
    """What torch.compile is told of the product of ``x`` [..., K] and the packed weight [N, K] transposed."""
    return x.new_empty(*x.shape[:-1], n)


class FourfoldMxFp4LinearKernel:
    """vLLM's interface of an MXFP4 linear kernel (``MxFp4LinearKernel``); shown under this name in its
    log."""

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Where the C++ extension can be loaded."""
        return native_available(), native_problem()

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """Weights only: activations stay what they are, as in vLLM's own weight-only kernels."""
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called once for every layer, with ``weight`` [N, K/2] and ``weight_scale`` [N, K/32], both
        uint8."""
        share_threads()
        packed = PackedWeight.pack(BlockTensor("mxfp4", layer.weight.data, layer.weight_scale.data))
        layer.weight = Parameter(packed.data, requires_grad=False)
        layer.fourfold_rows = packed.n
        del layer.weight_scale

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., K] -> [..., N], in the dtype of ``x``; rounded once from float32."""
        given = x if x.dtype == torch.bfloat16 else x.float()
        y = torch.ops.fourfold.mxfp4_linear(given.contiguous(), layer.weight, layer.fourfold_rows).to(x.dtype)
        return y if bias is None else y + bias


@cache
def share_threads() -> None:
    """Compute with the threads that torch has."""
    share_openmp_threads()
    set_threads(torch.get_num_threads())


def register() -> None:
    """Offer the kernel to vLLM's selection; called again in the same process it changes nothing."""
    from vllm.model_executor.kernels.linear import (  # pyright: ignore[reportMissingImports]
        _POSSIBLE_MXFP4_KERNELS,
        register_linear_kernel,
    )
    from vllm.platforms import PlatformEnum  # pyright: ignore[reportMissingImports]

    if FourfoldMxFp4LinearKernel not in _POSSIBLE_MXFP4_KERNELS.get(PlatformEnum.CPU, []):
        register_linear_kernel(FourfoldMxFp4LinearKernel, PlatformEnum.CPU, "mxfp4")
