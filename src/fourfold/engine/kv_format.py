"""How keys and values are held between steps: as computed, in FP8 under calibrated scales, or in MX blocks.

FP8 is E4M3 (OCP OFP8), value = code * scale, with one scale for all keys and one for all values of a layer,
or one for each key head: the checkpoint's, where it stores them, else 1. Beyond +-448 * scale values
saturate, where torch's cast would give NaN. MX formats (OCP MX v1.0) cut each head of each token into blocks
of 32 features with their own power of two; the codes of a head come first, then its scales. That is 8.25 bits
a value in MXFP8 and 4.25 in MXFP4, and needs no calibration. Keys have a few loud features, so each block is
first turned by the Hadamard matrix (as QuaRot, arXiv:2404.00456, does with whole heads); queries are turned
likewise and attention's result is turned back, which changes nothing but the rounding: q k = (q H) (k H).

Everything is held as raw bytes, since torch can neither gather nor scatter float8. A byte is read back by one
look-up in a table of the 256 things that it can mean, three times sooner than torch's cast from float8 and
ten times sooner than the formats' own reading, to the same bits. The price over the model's dtype is that
look-up for every cached value at every step, and the rounding of new ones.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import KVCacheFormat
from fourfold.formats import get_format, hadamard, turn
from fourfold.formats.numbers.mx import MX_BLOCK
from fourfold.formats.numbers.pack import unpack
from fourfold.formats.numbers.scale import byte_to_scale

FP8_LARGEST = 448.0
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class KVFormat(ABC):
    """``dtype`` is the model's; a head of one token is ``width`` elements of ``stored_dtype``."""

    name: KVCacheFormat | None

    def __init__(self, dtype: torch.dtype, width: int, stored_dtype: torch.dtype):
        self.dtype, self.width, self.stored_dtype = dtype, width, stored_dtype

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one token."""
        return self.width * self.stored_dtype.itemsize

    def turn(self, x: Tensor) -> Tensor:
        """Queries [..., D] to the basis in which keys are held, and what attention makes of values back."""
        return x

    @abstractmethod
    def encode(self, layer: int, kv: Tensor) -> Tensor:
        """kv [..., 2 * kv_heads, D] of the model's dtype -> [..., 2 * kv_heads, width] as stored."""

    @abstractmethod
    def decode(self, layer: int, stored: Tensor) -> Tensor:
        """The inverse of ``encode``, up to its rounding and its turn."""


class AsComputed(KVFormat):
    """No rounding at all."""

    name = None

    def __init__(self, dtype: torch.dtype, head_dim: int):
        super().__init__(dtype, head_dim, dtype)

    def encode(self, layer: int, kv: Tensor) -> Tensor:
        """``kv``."""
        return kv

    def decode(self, layer: int, stored: Tensor) -> Tensor:
        """``stored``."""
        return stored


class Fp8(KVFormat):
    """E4M3 codes; ``scales`` [layers, 2 * kv_heads], keys' first, are kept and applied in float32.

    A head's scale is folded into its own table of 256 values, so that reading costs one look-up all the same.
    """

    def __init__(self, name: KVCacheFormat, dtype: torch.dtype, head_dim: int, scales: Tensor | None = None):
        super().__init__(dtype, head_dim, torch.uint8)
        self.name = name
        self.scales = scales
        self._scales = None if scales is None else scales.float().unsqueeze(-1)
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        self._values = (values if self._scales is None else values * self._scales).to(dtype)

    def encode(self, layer: int, kv: Tensor) -> Tensor:
        """Codes of ``kv`` over the layer's scales."""
        if self._scales is not None:
            kv = kv.float() / self._scales[layer]
        return kv.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, layer: int, stored: Tensor) -> Tensor:
        """Codes times the layer's scales."""
        at, values = stored.int(), self._values
        if self._scales is not None:
            values = values[layer].view(-1)
            at += torch.arange(0, len(values), 256, dtype=torch.int32).unsqueeze(-1)
        return values.index_select(0, at.reshape(-1)).view(stored.shape)


class Microscaled(KVFormat):
    """Codes of a head, then the E8M0 scales of its blocks, turned; the rounding is that of ``formats``.

    Raises FourfoldError when ``head_dim`` is no whole number of blocks.
    """

    def __init__(self, name: KVCacheFormat, dtype: torch.dtype, head_dim: int):
        self.name, self._format = name, get_format(name)
        self._block = MX_BLOCK
        if head_dim % self._block:
            raise FourfoldError(
                f"A KV cache in {name} needs heads of a multiple of {self._block} features, and this model's "
                f"have {head_dim}. Choose --kv-cache fp8, or none."
            )
        bits = self._format.element.bits
        self._codes = head_dim * bits // 8
        super().__init__(dtype, self._codes + head_dim // self._block, torch.uint8)
        byte = torch.arange(256, dtype=torch.uint8)
        values = self._format.element.decode(unpack(byte.unsqueeze(-1), bits)).to(dtype)
        # the one or two values of a byte are moved as one integer
        self._values = values.view(INTEGERS[values.shape[-1] * dtype.itemsize]).view(-1)
        self._scales = byte_to_scale(byte).to(dtype)
        self._hadamard = hadamard(self._block)

    def turn(self, x: Tensor) -> Tensor:
        """Every block times the Hadamard matrix, which is its own inverse; float32, rounded once."""
        return turn(x.float(), self._hadamard).to(x.dtype)

    def encode(self, layer: int, kv: Tensor) -> Tensor:
        """Codes and scales of ``kv``, turned."""
        held = self._format.quantize(turn(kv.float(), self._hadamard))
        return torch.cat([held.blocks, held.scales], -1)

    def decode(self, layer: int, stored: Tensor) -> Tensor:
        """Elements times powers of two, which is exact in bfloat16 as far as bfloat16 reaches."""
        codes, scales = stored[..., : self._codes].int(), stored[..., self._codes :].int()
        values = self._values.index_select(0, codes.reshape(-1)).view(self.dtype)
        powers = self._scales.index_select(0, scales.reshape(-1))
        return values.view(-1, self._block).mul_(powers.unsqueeze(-1)).view(*stored.shape[:-1], -1)


def kv_format(
    name: KVCacheFormat | None, dtype: torch.dtype, head_dim: int, scales: Tensor | None = None
) -> KVFormat:
    """How a cache of format ``name`` is held; None is the model's ``dtype`` unchanged.

    ``scales`` as for :class:`Fp8`. Raises FourfoldError for a head that MX blocks do not fill.
    """
    if name is None:
        return AsComputed(dtype, head_dim)
    if name in ("fp8", "fp8-head"):
        return Fp8(name, dtype, head_dim, scales)
    return Microscaled(name, dtype, head_dim)
