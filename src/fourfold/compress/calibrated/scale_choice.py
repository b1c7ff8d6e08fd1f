"""The scales under which GPTQ rounds: of every block of a weight, before any of its columns is rounded.

Price: with a search, one rounding more of everything for every scale that is tried.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fourfold.compress.calibrated.nearest import Nearest
from fourfold.formats import BlockFormat
from fourfold.formats.numbers.block import parts


@dataclass
class Grid:
    """The values that a weight may take. ``whole`` is what all of it shares, where the format has that;
    ``search`` tries the neighbours of ``rule``'s scales.
    """

    block_format: BlockFormat
    rule: str | None
    whole: torch.Tensor | None
    search: bool

    def scales(self, weight: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales of ``weight`` float32 [out, in] as they are held, and what they multiply by,
        [out, blocks].

        With ``search`` the one of some neighbours that leaves the least error, each column's error multiplied
        by its ``importance`` [in] as GPTQ's loss counts it.
        """
        held = self.block_format.scales(weight, self.rule, self.whole)
        start = self._multipliers(held, len(weight))
        if not self.search or not held.ndim:
            return held, start
        best, runs = torch.empty_like(start), weight.unflatten(-1, (start.shape[-1], -1))
        counts = importance.square().view(runs.shape[1:])
        for rows in parts(weight):
            best[rows] = self._best(runs[rows], start[rows], counts)
        return self.block_format.nearest_scales(best, self.whole), best

    def whole_if_two_levels(self) -> torch.Tensor | None:
        """The global scale that is stored beside block scales."""
        return self.whole if self.block_format.block_size else None

    def _best(self, runs: torch.Tensor, start: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Of ``runs`` [n, blocks, size], from the multipliers ``start`` [n, blocks] on."""
        best, least = start, torch.full_like(start, torch.inf)
        scaled, rounded = torch.empty_like(runs), torch.empty_like(runs)
        nearest = Nearest(self.block_format.element, runs)
        for multiplier in self._neighbours(start):
            torch.div(runs, multiplier[..., None], out=scaled)
            nearest(scaled, rounded)
            error = rounded.sub_(scaled).square_().mul_(counts).sum(-1).mul_((multiplier / start).square_())
            better = error < least
            best, least = torch.where(better, multiplier, best), torch.where(better, error, least)
        return best

    def _neighbours(self, start: torch.Tensor) -> Iterator[torch.Tensor]:
        """Multipliers [n, blocks] that scales can stand for, with ``start`` first."""
        yield start
        if self.block_format.scale == "e8m0":
            yield (start * 2).clamp_max_(2.0**127)
            yield (start / 2).clamp_min_(2.0**-127)
            return
        for factor in (0.95, 0.9, 0.85, 0.8):
            held = self.block_format.nearest_scales(start * factor, self.whole)
            yield self._multipliers(held, len(start))

    def _multipliers(self, held: torch.Tensor, rows: int) -> torch.Tensor:
        found = self.block_format.multipliers(held, self.whole_if_two_levels())
        return found.reshape(rows, -1) if found.ndim else found.expand(rows, 1)
