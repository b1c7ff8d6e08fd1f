"""Formats whose scale is itself a float: INT4 groups, FP8 by tensor, channel or token, and NVFP4.

``scale = amax / reach``, rounded to the type that holds it and clamped to that type's positive range, so that
it is never zero; ``code = round(value / scale)`` by the rounded scale. ``reach`` is the element's largest
value, but 7.5 for INT4 (-8..7): half a step beyond 7 and inside -8, so that no error passes half a step. That
is the symmetric INT4 of GPTQ and compressed-tensors. A float16 scale saturates at 65504.

For NVFP4 the tensor first takes ``global_scale = amax / (448 * 6)`` over its finite blocks, and a block's
scale is held in E4M3 in units of it; a value is then ``element * scale * global_scale``. Files that store the
reciprocal, as compressed-tensors does, are a dialect's concern.
"""

from dataclasses import dataclass

import torch

from fourfold.formats.numbers.block import SCALES, BlockFormat, Layout, parts
from fourfold.formats.numbers.element import E4M3
from fourfold.formats.numbers.scale import ScaleRule

HELD_IN = {"fp32": torch.float32, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class ScaledFormat(BlockFormat):
    """Elements under one float scale a block, or a row where ``block_size`` is None.

    ``reach`` is what the largest magnitude becomes in units of the scale; 0 stands for the element's largest.
    """

    reach: float = 0.0

    @property
    def value_range(self) -> tuple[float, float]:
        """The smallest positive and the largest value; scales follow from float32 values."""
        smallest, largest = super().value_range
        return smallest, min(largest, SCALES["fp32"].largest)

    def _scales_layout(self, leading: list[int], width: int) -> Layout:
        count = width // self.block_size if self.block_size else 1
        return torch.Size([*leading, count]), HELD_IN[self.scale]

    def multipliers(self, scales: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
        """``scales`` in float32."""
        return scales.float()

    def nearest_scales(
        self, multipliers: torch.Tensor, global_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``multipliers`` in the type that holds them."""
        return self._hold(multipliers)

    def _encode(
        self, values: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scales = self._hold(values.abs().amax(-1) / (self.reach or self.element.max))
        return self._divide(values, scales.float()), scales

    def _decode(
        self, codes: torch.Tensor, scales: torch.Tensor | None, whole: torch.Tensor | None
    ) -> torch.Tensor:
        assert scales is not None
        return self.element.decode(codes) * scales.float()[:, None]

    def _hold(self, scales: torch.Tensor) -> torch.Tensor:
        """``scales`` in the type that holds them: never zero, and NaN where they are not finite."""
        limits = SCALES[self.scale]
        held = scales.clamp(limits.smallest, limits.largest).masked_fill_(~scales.isfinite(), torch.nan)
        return held.to(HELD_IN[self.scale])

    def _divide(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Codes of runs [n, run] over float32 scales [n]; all zeros under a NaN scale."""
        codes = self.element.encode(values / scales[:, None])
        return codes.masked_fill_(scales.isnan()[:, None], 0)


@dataclass(frozen=True)
class TensorScaledFormat(ScaledFormat):
    """One float32 scale for the whole tensor."""

    def _scales_layout(self, leading: list[int], width: int) -> Layout:
        return torch.Size([]), torch.float32

    def _whole(self, runs: torch.Tensor) -> torch.Tensor:
        return self._hold(largest_magnitudes(runs).max() / self.element.max)

    def _encode(
        self, values: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        assert whole is not None
        return self._divide(values, whole.expand(len(values))), None

    def _decode(
        self, codes: torch.Tensor, scales: torch.Tensor | None, whole: torch.Tensor | None
    ) -> torch.Tensor:
        assert whole is not None
        return self.element.decode(codes) * whole


@dataclass(frozen=True)
class TwoLevelFormat(ScaledFormat):
    """NVFP4: E4M3 block scales in units of one float32 scale for the tensor."""

    @property
    def value_range(self) -> tuple[float, float]:
        """The smallest positive and the largest value, under both scales."""
        return super().value_range[0] * SCALES["fp32"].smallest, SCALES["fp32"].largest

    def _scales_layout(self, leading: list[int], width: int) -> Layout:
        return super()._scales_layout(leading, width)[0], torch.uint8

    def _whole(self, runs: torch.Tensor) -> torch.Tensor:
        amax = largest_magnitudes(runs)
        amax = amax.masked_fill_(~amax.isfinite(), 0).max()
        return (amax / (self.element.max * E4M3.max)).clamp_min_(SCALES["fp32"].smallest)

    def multipliers(self, scales: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
        """``scales * global_scale``; 1 stands for a global scale that is not given."""
        own = scales.view(torch.float8_e4m3fn).float()
        return own if global_scale is None else own * global_scale

    def nearest_scales(
        self, multipliers: torch.Tensor, global_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """E4M3 bytes of ``multipliers / global_scale``."""
        own = multipliers if global_scale is None else multipliers / global_scale
        return self._hold(own).view(torch.uint8)

    def _encode(
        self, values: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert whole is not None
        scales = self._hold(values.abs().amax(-1) / self.element.max / whole)
        return self._divide(values, scales.float() * whole), scales.view(torch.uint8)

    def _decode(
        self, codes: torch.Tensor, scales: torch.Tensor | None, whole: torch.Tensor | None
    ) -> torch.Tensor:
        assert scales is not None and whole is not None
        return self.element.decode(codes) * (scales.view(torch.float8_e4m3fn).float() * whole)[:, None]


def largest_magnitudes(runs: torch.Tensor) -> torch.Tensor:
    """Float32 [n] of runs [n, run]; a single 0 where there are no values."""
    if not runs.numel():
        return torch.zeros(1, device=runs.device)
    return torch.cat([runs[part].abs().amax(-1).float() for part in parts(runs)])
