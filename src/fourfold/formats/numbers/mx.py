"""The microscaling formats of OCP MX v1.0: 32 elements share an E8M0 scale (section 5.2)."""

from dataclasses import dataclass

import torch

from fourfold.formats.numbers import fp4
from fourfold.formats.numbers.block import BlockFormat, Layout
from fourfold.formats.numbers.element import E2M1, ElementFormat
from fourfold.formats.numbers.scale import (
    NAN_BYTE,
    ScaleRule,
    byte_to_inverse,
    byte_to_scale,
    shared_exponent_byte,
)

MX_BLOCK = 32


@dataclass(frozen=True)
class MXFormat(BlockFormat):
    """Any element under a power-of-two block scale.

    Dividing by a power of two is exact: what float32 cannot hold is far below half of the smallest element
    and becomes a zero of its own sign either way. Where ``element * scale`` passes the float32 range (amax in
    its last eighth, rounded up) it reads back as Inf, which section 5.1 leaves to the implementation.
    """

    def _scales_layout(self, leading: list[int], width: int) -> Layout:
        return torch.Size([*leading, width // MX_BLOCK]), torch.uint8

    def multipliers(self, scales: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
        """``2^(scales - 127)``; NaN for 0xFF."""
        return byte_to_scale(scales)

    def nearest_scales(
        self, multipliers: torch.Tensor, global_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """E8M0 bytes of the nearest powers of two."""
        return multipliers.log2().round_().clamp_(-127, 127).add_(127).to(torch.uint8)

    def _encode(
        self, values: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        byte = shared_exponent_byte(values.abs().amax(-1), self.element, rule or ScaleRule.EVEN)
        codes = self.element.encode(values * byte_to_inverse(byte)[:, None])
        if rule is ScaleRule.MSE:
            byte, codes = self._keep_better(values, byte, codes)
        return codes.masked_fill_((byte == NAN_BYTE)[:, None], 0), byte

    def _own_scales(
        self, values: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> torch.Tensor | None:
        if rule is ScaleRule.MSE:
            return super()._own_scales(values, rule, whole)
        return shared_exponent_byte(values.abs().amax(-1), self.element, rule or ScaleRule.EVEN)

    def _round(
        self, values: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> torch.Tensor:
        if rule is ScaleRule.MSE or self.element.is_integer:
            return super()._round(values, rule, whole)
        # the same values without making codes, two to four times as fast
        byte = shared_exponent_byte(values.abs().amax(-1), self.element, rule or ScaleRule.EVEN)
        on_grid = self.element.round(values * byte_to_inverse(byte)[:, None])
        return on_grid.mul_(byte_to_scale(byte)[:, None])

    def _quantize_runs(
        self, runs: torch.Tensor, rule: ScaleRule | None, whole: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        quick = fp4.quantize_runs(runs, rule or ScaleRule.EVEN) if self.element is E2M1 else None
        return quick or super()._quantize_runs(runs, rule, whole)

    def _keep_better(
        self, values: torch.Tensor, byte: torch.Tensor, codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per block, FLOOR's scale or the next larger one, whichever leaves the smaller squared error.

        Under the next larger scale nothing saturates, so that a still larger one cannot be better. A smaller
        one clips the largest value by half, which pays so rarely that it is not tried. Errors are compared
        in units of the floor scale, so that nothing over- or underflows.
        """
        scaled = values * byte_to_inverse(byte)[:, None]
        higher_codes = self.element.encode(scaled / 2)
        error = (scaled - self.element.decode(codes)).square().sum(-1, dtype=torch.float64)
        higher_error = (scaled - 2 * self.element.decode(higher_codes)).square().sum(-1, dtype=torch.float64)
        better = (higher_error < error) & (byte < NAN_BYTE - 1)
        return byte + better, torch.where(better[:, None], higher_codes, codes)

    def _decode(
        self, codes: torch.Tensor, scales: torch.Tensor | None, whole: torch.Tensor | None
    ) -> torch.Tensor:
        assert scales is not None
        return self.element.decode(codes) * byte_to_scale(scales)[:, None]


def mx_format(name: str, element: ElementFormat) -> MXFormat:
    """The MX format of 32 ``element`` values; EVEN is its default rule."""
    return MXFormat(name, element, MX_BLOCK, "e8m0", ScaleRule.EVEN)
