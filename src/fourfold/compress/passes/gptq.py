"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

With inputs X [n, in] as the served model multiplies them, H = X^T X / n + damping, and U the upper Cholesky
factor of H^-1, rounding column j with the error e_j = (w_j - q_j) / U_jj changes each later column k by
-e_j U_jk (Frantar et al., arXiv:2210.17323). With ``asymmetry`` a > 0 it also makes up for what the rounding
of earlier layers changed in the inputs: with X0 the same tokens' inputs in the original model, column k further
changes by w_j P_jk, where P = a triu((X0 - X)^T X U^T / n, 1) U, as in GPTAQ (Li et al., arXiv:2504.02692),
whose a is 1/4.

Block formats share a scale among neighbouring columns. A block's scale is taken when its first column is
reached, from the weights as they then are. ``order: activation`` works through whole blocks, those with the
largest inputs first, so that blocks stay as they are stored and no reader needs to know of the order.

Price: one more run of the layer (three with ``asymmetry``), and per distinct input one or two [in, in]
matrices and a Cholesky factor; linear layers that share an input share them.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field

from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.passes.rtn import check_finite
from fourfold.compress.pipeline import Pass
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import LayerScheme
from fourfold.core.records import Record
from fourfold.formats import BlockFormat, BlockTensor, get_format

STATISTICS_BYTES = 8 * 2**30
COLUMNS_AT_ONCE = 128  # later columns are updated once per so many


class Options(Record):
    """``damping`` is a share of the mean diagonal of H, tenfold each time H is not positive definite."""

    damping: float = Field(0.01, gt=0, le=1)
    order: Literal["natural", "activation"] = "activation"
    asymmetry: float = Field(0.25, ge=0, le=1)
    search: bool = True


@dataclass
class Statistics:
    """Of one input: H [in, in], and D = (X0 - X)^T X [in, in] of its shift; sums over tokens."""

    hessian: torch.Tensor
    shift: torch.Tensor | None
    tokens: int = 0


def round_layer(work: LayerWork, options: Options) -> None:
    """Round every linear layer of the scheme. Raises FourfoldError that names one whose H is not finite."""
    shared = shared_inputs(work, list(work.schemes))
    for names in portions(work, list(shared), options):
        statistics = collect(work, names, options)
        for first in names:
            if first in statistics:  # an expert that no token reaches is left to be rounded to nearest
                round_together(work, shared[first], statistics.pop(first), options)


def portions(work: LayerWork, names: list[str], options: Options) -> list[list[str]]:
    """``names`` in order, cut where their statistics would pass ``STATISTICS_BYTES`` together: the matrices
    of 256 experts are larger than the experts.
    """
    found: list[list[str]] = [[]]
    held = 0
    for name in names:
        size = 4 * work.linears[name].in_features ** 2 * (2 if options.asymmetry else 1)
        if found[-1] and held + size > STATISTICS_BYTES:
            found.append([])
            held = 0
        found[-1].append(name)
        held += size
    return found


def shared_inputs(work: LayerWork, names: list[str]) -> dict[str, list[str]]:
    """``names`` of one module put together where their inputs are equal, under the first of each. Two experts
    may get the same tokens of the first batch, and others later.
    """
    seen: dict[str, torch.Tensor] = {}
    shared: dict[str, list[str]] = {}

    def see(name: str, x: torch.Tensor) -> None:
        scheme = work.schemes[name]
        for first, other in seen.items():
            if scheme == work.schemes[first] and _beside(name, first) and torch.equal(x, other):
                shared[first].append(name)
                return
        seen[name], shared[name] = x, [name]

    work.observe(names, see, work.inputs[:1])
    for name in names:
        if not any(name in together for together in shared.values()):
            shared[name] = [name]
    return shared


def _beside(first: str, second: str) -> bool:
    return first.rpartition(".")[0] == second.rpartition(".")[0]


def collect(work: LayerWork, names: list[str], options: Options) -> dict[str, Statistics]:
    """H and D of each of ``names`` over the calibration set, as means over tokens."""
    found: dict[str, Statistics] = {}
    for batch, hidden in enumerate(work.inputs):
        base: dict[str, torch.Tensor] = {}
        if options.asymmetry:
            assert work.base_inputs is not None
            # the two models send a token to different experts, so that their inputs cannot be paired
            paired = [name for name in names if ".experts." not in name]
            work.observe(paired, base.__setitem__, [work.base_inputs[batch]])

        def see(name: str, x: torch.Tensor, base: dict[str, torch.Tensor] = base) -> None:
            served = work.linears[name].as_served(x).float()
            add(found, name, served, base.get(name))

        work.observe(names, see, [hidden])
    for statistics in found.values():
        statistics.hessian /= statistics.tokens
        if statistics.shift is not None:
            statistics.shift /= statistics.tokens
    return found


def add(found: dict[str, Statistics], name: str, x: torch.Tensor, base: torch.Tensor | None) -> None:
    """Count the inputs ``x`` [n, in] of ``name``; ``base`` are the same tokens' in the original model."""
    width = x.shape[-1]
    if name not in found:
        found[name] = Statistics(x.new_zeros(width, width), None)
    statistics = found[name]
    statistics.tokens += len(x)
    statistics.hessian += product(x.T, x)
    if base is not None and base.shape == x.shape:
        if statistics.shift is None:
            statistics.shift = torch.zeros_like(statistics.hessian)
        statistics.shift += product((base.float() - x).T, x)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float32. A GPU multiplies inputs as it does in the model, in bfloat16, which is fast."""
    if a.is_cuda:
        return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)
    return a @ b


def round_together(work: LayerWork, names: list[str], statistics: Statistics, options: Options) -> None:
    """Round linear layers that share an input and a scheme."""
    for name in names:
        check_finite(f"{name}.weight", work.linears[name].weight)
    weight = torch.cat([work.linears[name].weight for name in names])
    rounded = gptq(names[0], weight, work.schemes[names[0]], statistics, options)
    start = 0
    for name in names:
        end = start + len(work.linears[name].weight)
        work.finish(name, rows_of(rounded, start, end))
        start = end


def rows_of(tensor: BlockTensor, start: int, end: int) -> BlockTensor:
    """Rows ``start`` to ``end`` of ``tensor``; a scale of the whole tensor is shared."""
    scales = tensor.scales[start:end] if tensor.scales.ndim else tensor.scales
    return replace(tensor, blocks=tensor.blocks[start:end], scales=scales)


def gptq(
    name: str, weight: torch.Tensor, scheme: LayerScheme, statistics: Statistics, options: Options
) -> BlockTensor:
    """``weight`` [out, in] rounded to the scheme's format."""
    block_format = get_format(scheme.weight)
    size = block_format.block_size or weight.shape[-1]
    order = block_order(statistics.hessian.diagonal(), size, options)
    hessian = statistics.hessian[order][:, order]
    factor = inverse_factor(name, hessian, options.damping)
    pull = None
    if statistics.shift is not None:
        shift = statistics.shift[order][:, order]
        pull = options.asymmetry * (shift @ factor.T).triu_(1) @ factor
    grid = Grid(block_format, scheme.scale_rule, block_format.whole_scale(weight), options.search)
    values, scales = sweep(weight.T[order].float().contiguous(), factor, pull, size, grid)
    back = torch.argsort(order)
    stored = scales[0] if len(scales) == 1 else torch.cat([scales[i] for i in back[::size] // size], -1)
    return block_format.quantize_with_scales(
        values[back].T.contiguous(), stored, grid.whole_if_two_levels(), scheme.scale_rule
    )


@dataclass
class Grid:
    """The values that a block of columns may take."""

    block_format: BlockFormat
    rule: str | None
    whole: torch.Tensor | None
    search: bool

    def scales(self, columns: torch.Tensor, pivots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales of ``columns`` [block, out] as they are held, and what they multiply by [out].

        With ``search`` the one of three neighbours that leaves the least error, each column's error counted
        by its ``pivots`` as GPTQ's loss counts it.
        """
        rows = columns.T.contiguous()
        held = self.block_format.scales(rows, self.rule, self.whole)
        if not self.search or not held.ndim:
            return held, self._multipliers(held, len(rows))
        start = self._multipliers(held, len(rows))
        best, best_error = start, torch.full_like(start, torch.inf)
        for factor in (1.0, 2.0, 0.5) if self.block_format.scale == "e8m0" else (1.0, 0.95, 0.9, 0.85, 0.8):
            tried = self.block_format.nearest_scales((start * factor)[:, None], self.whole)
            multiplier = self._multipliers(tried, len(rows))
            error = ((self.round(columns, multiplier) - columns) / pivots[:, None]).square().sum(0)
            better = error < best_error
            best, best_error = torch.where(better, multiplier, best), torch.where(better, error, best_error)
        return self.block_format.nearest_scales(best[:, None], self.whole), best

    def round(self, columns: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        """``columns`` [..., out] at the nearest values under ``multiplier`` [out]."""
        return self.block_format.element.round(columns / multiplier).mul_(multiplier)

    def whole_if_two_levels(self) -> torch.Tensor | None:
        """The global scale that is stored beside block scales."""
        return self.whole if self.block_format.block_size else None

    def _multipliers(self, held: torch.Tensor, rows: int) -> torch.Tensor:
        return self.block_format.multipliers(held, self.whole_if_two_levels()).reshape(-1).expand(rows)


def sweep(
    w: torch.Tensor, factor: torch.Tensor, pull: torch.Tensor | None, size: int, grid: Grid
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Round ``w`` [in, out] row by row, which are the weight's columns: its values, and each block's scales."""
    scales: list[torch.Tensor] = []
    multiplier = w[0]
    pivots = factor.diagonal()
    for begin in range(0, len(w), COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, len(w))
        errors, before = torch.empty_like(w[begin:end]), w[begin:end].clone()
        for j in range(begin, end):
            if j % size == 0:
                held, multiplier = grid.scales(w[j : j + size], pivots[j : j + size])
                scales.append(held)
            before[j - begin] = w[j]
            w[j] = grid.round(w[j], multiplier)
            error = (before[j - begin] - w[j]).div_(pivots[j])
            errors[j - begin] = error
            w[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            if pull is not None:
                w[j + 1 : end].addr_(pull[j, j + 1 : end], before[j - begin])
        w[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
        if pull is not None:
            w[end:].addmm_(pull[begin:end, end:].T, before)
    return w, scales


def block_order(diagonal: torch.Tensor, size: int, options: Options) -> torch.Tensor:
    """Column numbers, whole blocks at a time: as they are, or the block with the largest inputs first."""
    columns = torch.arange(len(diagonal), device=diagonal.device).view(-1, size)
    if options.order == "natural":
        return columns.flatten()
    return columns[diagonal.view(-1, size).sum(-1).argsort(descending=True, stable=True)].flatten()


def inverse_factor(name: str, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped ``hessian`` [in, in]."""
    if not hessian.isfinite().all():
        raise FourfoldError(f"The inputs of {name} are not finite.")
    mean = hessian.diagonal().mean()
    while damping <= 1:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise FourfoldError(f"The Hessian of {name} is not positive definite.")


PASS = Pass("gptq", "round", layer=round_layer, options=Options, needs_base=lambda o: o.asymmetry > 0)
