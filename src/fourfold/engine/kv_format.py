"""How keys and values are held between steps: as computed, or rounded to FP8.

FP8 is E4M3 (OCP OFP8), value = code * scale, one scale for all keys and one for all values of a layer: the
checkpoint's where it stores them, else 1. Beyond +-448 * scale values saturate, where torch's cast would give
NaN. Codes are kept as raw bytes, since torch can neither gather nor scatter float8.
"""

import torch
from torch import Tensor

from fourfold.core.errors import FourfoldError

FP8_LARGEST = 448.0


class KVFormat:
    """``fp8`` or, with name None, the model's ``dtype`` unchanged.

    ``scales`` [layers, 2], keys' and values', are kept and applied in float32.
    """

    def __init__(self, name: str | None, dtype: torch.dtype, kv_heads: int, scales: Tensor | None = None):
        if name not in (None, "fp8"):
            raise FourfoldError(
                f"The checkpoint asks for a KV cache in '{name}'; the engine holds fp8 (E4M3) or the model's "
                "dtype. Quantize again with a recipe whose kv_cache is fp8 or absent."
            )
        self.name, self.dtype = name, dtype
        self.stored_dtype = dtype if name is None else torch.uint8
        self._scales = None
        if scales is not None:
            self._scales = scales.float().repeat_interleave(kv_heads, 1).unsqueeze(-1)

    def encode(self, layer: int, kv: Tensor) -> Tensor:
        """kv [..., 2 * kv_heads, D] of the model's dtype -> the same shape as stored."""
        if self.name is None:
            return kv
        if self._scales is not None:
            kv = kv / self._scales[layer]
        return kv.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, layer: int, stored: Tensor) -> Tensor:
        """The inverse of ``encode``, up to its rounding."""
        if self.name is None:
            return stored
        kv = stored.view(torch.float8_e4m3fn).to(self.dtype)
        return kv if self._scales is None else kv.mul_(self._scales[layer])
