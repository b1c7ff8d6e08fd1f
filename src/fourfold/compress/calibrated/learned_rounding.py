"""A weight whose rounding is learned: up or down for each value, and how far each block is clipped.

In units of the block's scale s, a value y = w / s lies between two elements one ``step`` apart (E2M1's
steps are 0.5, 1 and 2). The learned offset V (in steps, |V| <= ``reach``) moves it before it is rounded:

    q = s * element(step * round(y / step + V)),    s = nearest(2^t)

where t, the logarithm of the scale, is learned as well: for powers of two it decides the exponent, and
starts at log2(amax / largest element), drawn towards the exponent that it is to start with; for other
scales it is the scale. Gradients pass straight through both roundings, save where q saturates (Cheng et
al., arXiv:2309.05516; Esser et al., arXiv:1902.08153 for the scale).

The price is six numbers in float32 for each weight while it is learned.
"""

import torch

from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.scale_search import global_scale
from fourfold.core.quantization import LayerScheme
from fourfold.formats import BlockTensor, get_format

LN2 = 0.6931471805599453
HALF = 0.5
MARGIN = 0.25  # how far beyond a threshold V starts, lest the first steps undo what it starts at
NEAREST = 0.45  # how far t may start from the middle of its exponent, so that no rounding error changes it


class LearnedRounding:
    """The weight [out, in] of ``linear``, to be held as ``scheme`` says, starting from ``scales``.

    ``offset`` (V, [runs, run]) and ``log2_scale`` (t, in the shape of ``scales``) may be changed by anyone;
    ``write`` then puts the rounded weight into the linear layer, ``gradients`` turns its gradient into
    theirs.
    """

    def __init__(
        self, linear: CalibratedLinear, scheme: LayerScheme, scales: torch.Tensor, reach: float = 0.5
    ):
        self.form, self.rule, self.reach = get_format(scheme.weight), scheme.scale_rule, reach
        self.linear = linear
        weight = linear.weight.detach().clone()
        self.whole = global_scale(weight, self.form)
        self.runs = weight.view(-1, self.form.block_size or weight.shape[-1])
        self.offset = torch.zeros_like(self.runs)
        self.log2_scale = self._start(self.form.multipliers(scales, self.whole))

    def _start(self, multipliers: torch.Tensor) -> torch.Tensor:
        given = multipliers.log2()
        if self.form.scale != "e8m0":
            return given
        wanted = (self.runs.abs().amax(-1).view_as(given) / self.form.element.max).log2()
        return wanted.clamp(given - NEAREST, given + NEAREST)

    @torch.no_grad()
    def start_at(self, rounded: torch.Tensor) -> None:
        """Set V so that the weight is rounded to ``rounded`` [out, in] (values under the present scales), as
        far as the reach goes: to zero where it is anyway, else to a quarter step past the threshold.
        """
        scale, y, step, nearest = self._rounded()
        wanted = rounded.view_as(self.runs) / scale
        away = (wanted - y) / step
        past = away - away.sign() * (HALF - MARGIN)
        reached = self.form.element.round(past * step + y) == wanted
        self.offset = torch.where(nearest == wanted, 0, torch.where(reached, past, away))
        self.confine()

    def scales(self) -> torch.Tensor:
        """The scales as they are held."""
        return self.form.nearest_scales(self.log2_scale.detach().exp2(), self.whole)

    def values(self) -> torch.Tensor:
        """The rounded weight, [runs, run]."""
        scale, _, _, rounded = self._rounded()
        return rounded * scale

    def write(self) -> None:
        """Let the linear layer compute with the rounded weight."""
        self.linear.weight.data.copy_(self.values().view_as(self.linear.weight))

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Those of V and t from the weight's own ``grad``; None when no token reached it."""
        if self.linear.weight.grad is None:
            return None
        scale, y, step, rounded = self._rounded()
        upstream = self.linear.weight.grad.view_as(self.runs).float() * scale
        moved = y + self.offset.detach() * step
        inside = moved.abs() <= self.form.element.max + step / 2
        by_scale = upstream * torch.where(inside, rounded - y, rounded)
        per_run = by_scale.sum(-1) * LN2
        whole = per_run.view_as(self.log2_scale) if self.log2_scale.ndim else per_run.sum()
        return upstream.mul_(step).mul_(inside), whole

    def move(
        self, gradients: tuple[torch.Tensor, torch.Tensor], offset_step: float, scale_step: float
    ) -> None:
        """One step against the signs of ``gradients``."""
        self.offset.sub_(gradients[0].sign_(), alpha=offset_step)
        self.log2_scale.sub_(gradients[1].sign_(), alpha=scale_step)
        self.confine()

    @torch.no_grad()
    def confine(self) -> None:
        """Keep V within its reach."""
        self.offset.clamp_(-self.reach, self.reach)

    def blocks(self) -> BlockTensor:
        """The rounded weight as it is stored."""
        weight = self.values().view_as(self.linear.weight)
        return self.form.quantize_with_scales(weight, self.scales(), self.whole, self.rule)

    @torch.no_grad()
    def _rounded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scales [runs or 1, 1]; values, steps and rounded values [runs, run] in units of them."""
        scale = self.form.multipliers(self.scales(), self.whole).reshape(-1, 1)
        y = self.runs / scale
        step = self.form.element.step(y)
        moved = (
            self.offset * step + y if self.reach > HALF else (y / step).add_(self.offset).round_().mul_(step)
        )
        return scale, y, step, self.form.element.round(moved)
