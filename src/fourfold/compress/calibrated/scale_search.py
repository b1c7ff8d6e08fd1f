"""Block scales chosen by the error they leave in a layer's output, seen through the inputs' mean squares.

With inputs x of mean squares h, the error that rounding w to q leaves in an output is E[((w - q) x)^2],
whose diagonal part is ``sum_j h_j (w_j - q_j)^2``: a sum over blocks, so each block chooses for itself.
Powers of two are tried at FLOOR's exponent, one below (which clips the largest value by up to half of it)
and one above (where nothing is clipped; a still larger one only loses digits). Other scales are shrunk step
by step.

The price is one run of the layer for h, and one rounding of each weight per candidate.
"""

import torch

from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.work import LayerWork
from fourfold.formats import BlockFormat, ScaleRule
from fourfold.formats.numbers.block import parts

EXPONENTS = (0, 1, -1)
SHRINKS = tuple(1 - 0.05 * step for step in range(9))


class MeanSquares:
    """Of each input of the layers ``linears``, as it is served, over all tokens that ``see`` is shown."""

    def __init__(self, linears: dict[str, CalibratedLinear]):
        self.linears = linears
        self.counts = dict.fromkeys(linears, 0)
        self.sums = {
            name: torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
            for name, linear in linears.items()
        }

    def see(self, name: str, x: torch.Tensor) -> None:
        """Count the inputs ``x`` [n, in] of the layer ``name``."""
        self.sums[name] += self.linears[name].as_served(x.float()).square().sum(0, dtype=torch.float64)
        self.counts[name] += len(x)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Float32 [in]; ones for a layer (an expert) that no token reached."""
        count = self.counts[name]
        return (self.sums[name] / count).float() if count else torch.ones_like(self.sums[name]).float()


def mean_squares(work: LayerWork) -> MeanSquares:
    """Those of the linear layers that are to be rounded; notes in ``work`` which of them no token reached."""
    found = MeanSquares({name: work.linears[name] for name in work.schemes})
    work.observe(work.schemes, found.see)
    starved = [name for name, count in found.counts.items() if not count]
    work.notes += [f"{name} saw no token; its scales minimise the plain error" for name in starved]
    return found


def search_scales(weight: torch.Tensor, form: BlockFormat, importance: torch.Tensor) -> torch.Tensor:
    """The scales, as ``form`` holds them, that minimise ``sum_j importance_j (w_j - q_j)^2`` of each block.

    ``weight`` [out, in] is finite float32, ``importance`` [in] is not negative. Of equal errors the first
    candidate's wins: FLOOR's exponent, or the scale that does not shrink.
    """
    whole = global_scale(weight, form)
    best = least = None
    for scales in _candidates(weight, form, whole):
        error = _errors(weight, form, form.multipliers(scales, whole), importance)
        if best is None or least is None:
            best, least = scales, error
            continue
        better = error < least
        best = torch.where(better, scales.view(_bits(scales)), best.view(_bits(best))).view(scales.dtype)
        least = torch.where(better, error, least)
    assert best is not None
    return best


def global_scale(weight: torch.Tensor, form: BlockFormat) -> torch.Tensor | None:
    """What is stored beside block scales: nvfp4's float32 scalar, None elsewhere."""
    return form.whole_scale(weight) if form.scale == "e4m3" else None


def _candidates(weight: torch.Tensor, form: BlockFormat, whole: torch.Tensor | None) -> list[torch.Tensor]:
    if form.scale == "e8m0":
        floor = form.scales(weight, ScaleRule.FLOOR).int()
        return [(floor + shift).clamp_(0, 254).to(torch.uint8) for shift in EXPONENTS]
    start = form.scales(weight, whole=whole)
    multipliers = form.multipliers(start, whole)
    return [start, *(form.nearest_scales(multipliers * shrink, whole) for shrink in SHRINKS[1:])]


def _bits(scales: torch.Tensor) -> torch.dtype:
    """An integer type as wide as that of ``scales``: choosing among bytes must not round them."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[scales.dtype.itemsize]


def _errors(
    weight: torch.Tensor, form: BlockFormat, multipliers: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    """The weighted squared error under each scale, in the shape of ``multipliers``."""
    run = form.block_size or weight.shape[-1]
    runs = weight.reshape(-1, run)
    weights = importance.view(-1, run)
    own = multipliers.reshape(-1, 1).expand(len(runs), 1)
    errors = torch.empty(len(runs), device=weight.device)
    for part in parts(runs):
        scaled = runs[part] / own[part]
        error = form.element.round(scaled).sub_(scaled).mul_(own[part]).square_()
        index = torch.arange(len(runs), device=weight.device)[part] % len(weights)
        errors[part] = error.mul_(weights[index]).sum(-1)
    return errors.view(multipliers.shape) if multipliers.ndim else errors.sum()
