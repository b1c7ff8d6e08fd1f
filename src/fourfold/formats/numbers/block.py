"""Block formats: runs of values along the last dimension that share a scale, and the tensors they make.

A value is ``element * scale`` (NVFP4: ``* global_scale`` as well), as in OCP MX v1.0 section 5.1. Scales
are never zero: a run of zeros gets the format's smallest scale. A NaN or Inf makes every value that shares
its scale NaN, so that nothing that was not finite ever reads back as finite.

Tensors are worked through in parts of about a million values (on a GPU 16 million, since there a small part
is all launching), so that temporaries stay within some tens of megabytes (a gigabyte) whatever the size; the
price is that a tensor that is not contiguous is copied once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.formats.numbers.element import ElementFormat
from fourfold.formats.numbers.pack import pack, unpack
from fourfold.formats.numbers.registry import get_format
from fourfold.formats.numbers.scale import ScaleRule

PART_VALUES = 2**20
GPU_PART_VALUES = 2**24
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Layout = tuple[torch.Size, torch.dtype]


class ScaleType(NamedTuple):
    """How a scale is held, and the range of what it may be."""

    bits: int
    smallest: float
    largest: float


FLOAT32 = torch.finfo(torch.float32)
SCALES = {
    "e8m0": ScaleType(8, 2.0**-127, 2.0**127),
    "e4m3": ScaleType(8, 2.0**-9, 448.0),
    "fp16": ScaleType(16, 2.0**-24, 65504.0),
    "fp32": ScaleType(32, FLOAT32.tiny, FLOAT32.max),
}


@dataclass(frozen=True, eq=False)
class BlockTensor:
    """A tensor [..., K] in a block format: packed codes and the scales they share.

    ``blocks`` is uint8 [..., K * bits / 8]. ``scales`` is uint8 E8M0 [..., K/32] for the MX formats, uint8
    E4M3 [..., K/16] for nvfp4, float16 [..., K/N] for int4-gN, float32 [..., 1] for fp8-channel and
    fp8-token, float32 [] for fp8-tensor. ``global_scale`` is a float32 scalar that multiplies, nvfp4 only.
    """

    format: str
    blocks: torch.Tensor
    scales: torch.Tensor
    scale_rule: str | None = None
    global_scale: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The logical shape."""
        bits = get_format(self.format).element.bits
        return torch.Size([*self.blocks.shape[:-1], self.blocks.shape[-1] * 8 // bits])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        extra = 0 if self.global_scale is None else self.global_scale.nbytes
        return self.blocks.nbytes + self.scales.nbytes + extra

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values, [..., K]."""
        return get_format(self.format).dequantize(self, dtype)


@dataclass(frozen=True)
class BlockFormat(ABC):
    """A way to hold a tensor. ``block_size`` None: a whole row or tensor shares the scale.

    ``scale`` is how a scale is held: e8m0, e4m3, fp16 or fp32. ``default_rule`` is None where the scale is no
    power of two and no rule applies.
    """

    name: str
    element: ElementFormat
    block_size: int | None
    scale: str
    default_rule: ScaleRule | None = None

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value, block scales included; one scale a row or a tensor counts as nothing."""
        return self.element.bits + (SCALES[self.scale].bits / self.block_size if self.block_size else 0)

    @property
    def value_range(self) -> tuple[float, float]:
        """The smallest positive and the largest value, under the smallest and the largest scale."""
        scale = SCALES[self.scale]
        return self.element.min * scale.smallest, self.element.max * scale.largest

    def empty_shapes(self, shape: torch.Size | tuple[int, ...]) -> dict[str, Layout]:
        """Shape and dtype of ``blocks`` and ``scales`` for a tensor of ``shape``, without data.

        Raises FourfoldError when the last dimension is no whole number of blocks.
        """
        if not shape or shape[-1] % (self.block_size or 1):
            raise FourfoldError(
                f"A tensor of shape {list(shape)} cannot be held in {self.name}: its last dimension must be "
                f"a multiple of {self.block_size or 1}. Keep this tensor as it is, or choose another format."
            )
        *leading, width = shape
        blocks = torch.Size([*leading, width * self.element.bits // 8])
        return {"blocks": (blocks, torch.uint8), "scales": self._scales_layout(leading, width)}

    def quantize(self, x: torch.Tensor, rule: ScaleRule | str | None = None) -> BlockTensor:
        """``x`` [..., K] (bfloat16, float16 or float32) in this format.

        Raises FourfoldError for another dtype or a K that is no multiple of the block, UsageError for a rule
        that this format does not know.
        """
        layout, rule = self._checked(x, rule)
        blocks, scales = (torch.empty(s, dtype=d, device=x.device) for s, d in layout.values())
        runs = self._runs(x)
        whole = self._whole(runs)
        packed = blocks.view(len(runs), -1) if len(runs) else blocks
        for part in parts(runs):
            packed[part], own = self._quantize_runs(runs[part], rule, whole)
            if own is not None:
                scales.view(-1)[part] = own
        if whole is not None and not scales.ndim:
            scales, whole = whole, None
        return BlockTensor(self.name, blocks, scales, rule and rule.value, whole)

    def whole_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """What all of ``x`` [..., K] shares: nvfp4's global scale, fp8-tensor's only one; None elsewhere."""
        return self._whole(self._runs(x))

    def scales(
        self, x: torch.Tensor, rule: ScaleRule | str | None = None, whole: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The scales alone of ``quantize(x, rule)``, as they are held; nvfp4's under the global scale
        ``whole`` when it is given. Raises as ``quantize`` does.
        """
        layout, rule = self._checked(x, rule)
        runs = self._runs(x)
        whole = self._whole(runs) if whole is None else whole
        own = self._own_scales(runs.float(), rule, whole)
        return whole if own is None else own.view(layout["scales"][0])  # pyright: ignore[reportReturnType]

    def quantize_with_scales(
        self,
        x: torch.Tensor,
        scales: torch.Tensor,
        global_scale: torch.Tensor | None = None,
        rule: ScaleRule | str | None = None,
    ) -> BlockTensor:
        """``x`` [..., K] under the given ``scales`` (as ``BlockTensor`` holds them): each value goes to the
        nearest element, and saturates. ``rule`` is only recorded. Raises as ``quantize`` does, and
        FourfoldError for scales of another shape or type, and for values that are not finite.
        """
        layout, rule = self._checked(x, rule)
        if (scales.shape, scales.dtype) != layout["scales"]:
            raise FourfoldError(
                f"Scales of {self.name} for a tensor of shape {list(x.shape)} must be "
                f"{layout['scales'][1]} {list(layout['scales'][0])}, not {scales.dtype} {list(scales.shape)}."
            )
        if not x.isfinite().all():
            raise FourfoldError(
                f"Values that are not finite cannot be held in {self.name} under given scales."
            )
        multipliers = self.multipliers(scales, global_scale)
        runs = self._runs(x)
        own = multipliers.reshape(-1, 1).expand(len(runs), 1)
        blocks = torch.empty(layout["blocks"][0], dtype=torch.uint8, device=x.device)
        packed = blocks.view(len(runs), -1) if len(runs) else blocks
        for part in parts(runs):
            # a block whose scale is NaN holds zeros; what the scale makes infinite saturates
            scaled = (runs[part].float() / own[part]).nan_to_num_(0, torch.inf, -torch.inf)
            codes = self.element.encode(scaled)
            packed[part] = pack(codes, self.element.bits)
        return BlockTensor(self.name, blocks, scales, rule and rule.value, global_scale)

    @abstractmethod
    def multipliers(self, scales: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
        """Float32, the shape of ``scales``: what an element of each block is multiplied by."""

    @abstractmethod
    def nearest_scales(
        self, multipliers: torch.Tensor, global_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The scales, as they are held, nearest to positive finite float32 ``multipliers`` (powers of two: on
        a logarithmic scale).
        """

    def dequantize(self, tensor: BlockTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values of ``tensor``, [..., K] in ``dtype``; computed in float32 and rounded once."""
        values = torch.empty(tensor.shape, dtype=dtype, device=tensor.blocks.device)
        runs = self._runs(values)
        packed = tensor.blocks.reshape(len(runs), -1) if len(runs) else tensor.blocks
        whole = tensor.global_scale if tensor.scales.ndim else tensor.scales
        for part in parts(runs):
            own = tensor.scales.reshape(-1)[part] if tensor.scales.ndim else None
            runs[part] = self._decode(unpack(packed[part], self.element.bits), own, whole)
        return values

    def fake_quantize(self, x: torch.Tensor, rule: ScaleRule | str | None = None) -> torch.Tensor:
        """``x`` quantized and read back, in its own dtype. Raises as ``quantize`` does."""
        _, rule = self._checked(x, rule)
        runs = self._runs(x)
        whole = self._whole(runs)
        result = torch.empty_like(runs)
        for part in parts(runs):
            result[part] = self._round(runs[part].float(), rule, whole)
        return result.view(x.shape)

    def signal_and_noise(self, x: torch.Tensor, rule: ScaleRule | str | None = None) -> tuple[float, float]:
        """Sums of ``x^2`` and of the squared error in this format. Raises as ``quantize`` does."""
        _, rule = self._checked(x, rule)
        runs = self._runs(x)
        whole = self._whole(runs)
        signal = noise = 0.0
        for part in parts(runs):
            values = runs[part].float()
            error = self._decode(*self._encode(values, rule, whole), whole).sub_(values)
            signal += values.square().sum(dtype=torch.float64).item()
            noise += error.square_().sum(dtype=torch.float64).item()
        return signal, noise

    @abstractmethod
    def _scales_layout(self, leading: list[int], width: int) -> Layout: ...

    @abstractmethod
    def _encode(
        self, values: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes (uint8) and scales [n] of float32 runs [n, run]; None where ``whole`` is the scale."""

    @abstractmethod
    def _decode(
        self, codes: torch.Tensor, scales: torch.Tensor | None, whole: torch.Tensor | None
    ) -> torch.Tensor: ...

    def _own_scales(
        self, values: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The scales of ``_encode``."""
        return self._encode(values, rule, whole)[1]

    def _round(
        self, values: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> torch.Tensor:
        """Float32 runs encoded and decoded."""
        return self._decode(*self._encode(values, rule, whole), whole)

    def _quantize_runs(
        self, runs: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        codes, scales = self._encode(runs.float(), rule, whole)
        return pack(codes, self.element.bits), scales

    def _whole(self, runs: torch.Tensor) -> torch.Tensor | None:
        """A float32 scalar that the whole tensor shares, where the format has one."""
        return None

    def _runs(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as contiguous [n, run], each run sharing a scale."""
        run = self.block_size or x.shape[-1]
        return x.detach().reshape(x.numel() // max(run, 1), run).contiguous()

    def _checked(
        self, x: torch.Tensor, rule: ScaleRule | str | None
    ) -> tuple[dict[str, Layout], ScaleRule | None]:
        if x.dtype not in INPUT_DTYPES:
            raise FourfoldError(
                f"A tensor of dtype {x.dtype} cannot be quantized to {self.name}. "
                "Give bfloat16, float16 or float32."
            )
        if rule is None:
            return self.empty_shapes(x.shape), self.default_rule
        choices = list(ScaleRule) if self.default_rule else []
        if rule not in choices:
            known = f"Choose one of: {', '.join(choices)}." if choices else "It takes none."
            raise UsageError(f"Format {self.name} has no scale rule '{rule}'. {known}")
        return self.empty_shapes(x.shape), ScaleRule(rule)


def parts(runs: torch.Tensor) -> Iterator[slice]:
    """Slices over the first dimension of about PART_VALUES values each, GPU_PART_VALUES on a GPU."""
    values = GPU_PART_VALUES if runs.is_cuda else PART_VALUES
    count, step = len(runs), max(1, values // max(1, math.prod(runs.shape[1:])))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
