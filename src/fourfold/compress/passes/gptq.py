"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

With inputs X [n, in] as the served model multiplies them, H = X^T X / n + damping, and U the upper Cholesky
factor of H^-1, rounding column j with the error e_j = (w_j - q_j) / U_jj changes each later column k by
-e_j U_jk (Frantar et al., arXiv:2210.17323). With ``asymmetry`` a > 0 it also makes up for what the rounding
of earlier layers changed in the inputs: with X0 the same tokens' inputs in the original model, column k
further changes by w_j P_jk, where P = a triu((X0 - X)^T X U^T / n, 1) U, as in GPTAQ (Li et al.,
arXiv:2504.02692), whose a is 1/4. :mod:`fourfold.compress.calibrated.column_feedback` says how this is
computed without an inverse.

Block formats share a scale among neighbouring columns. All scales are chosen before any column is rounded,
from the original weights (``search``: of some neighbours the one that leaves the least error as this loss
counts it), and so columns can be rounded in any order, ``activation`` being those with the largest inputs
first, while blocks stay as they are stored: no reader needs to know of the order.

The first columns are rounded not knowing what will become of the later ones. ``sweeps`` of coordinate descent
(QuantEase, Behdin et al., arXiv:2309.01885) then round each column anew, all others being as they are.

Linear layers are rounded in the order in which they run, all of one kind together, and each kind's inputs
come from the kinds before it as they were rounded: the output projection sees what the rounded values make.

Price: for each kind the layer is run up to there (twice with ``asymmetry``, which also holds the layer's
original weights), and per distinct input there are one or two [in, in] matrices and a Cholesky factor, or as
long as there are few tokens the inputs themselves; linear layers that share an input share them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from pydantic import Field

from fourfold.compress.calibrated.column_feedback import DenseFeedback, Feedback
from fourfold.compress.calibrated.column_rounding import round_columns, turn
from fourfold.compress.calibrated.scale_choice import Grid
from fourfold.compress.calibrated.token_feedback import TokenFeedback
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.passes.rtn import check_finite
from fourfold.compress.pipeline import Pass
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import LayerScheme
from fourfold.core.records import Record
from fourfold.formats import BlockTensor, get_format

STATISTICS_BYTES = 8 * 2**30
EXPERTS = ".experts."
INPUTS_PER_TOKEN = 4  # matrices [in, in] take over once there are more tokens than a share of the inputs


class Options(Record):
    """``damping`` is a share of the mean diagonal of H, tenfold each time H is not positive definite."""

    damping: float = Field(0.01, gt=0, le=1)
    order: Literal["natural", "activation"] = "activation"
    asymmetry: float = Field(0.25, ge=0, le=1)
    search: bool = True
    sweeps: int = Field(0, ge=0, le=100)


@dataclass
class Statistics:
    """Of one input: the tokens' inputs [n, in] in ``x`` and their shifts X0 - X in ``shifts``, or, once there
    are many, the sums over tokens H = X^T X and (X0 - X)^T X, [in, in] each. A shift of None is none.
    """

    tokens: int = 0
    x: list[torch.Tensor] = field(default_factory=list)
    shifts: list[torch.Tensor | None] = field(default_factory=list)
    hessian: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def add(self, x: torch.Tensor, shift: torch.Tensor | None) -> None:
        """Count the inputs ``x`` [n, in]."""
        self.tokens += len(x)
        self.x.append(x)
        self.shifts.append(shift)
        if self.hessian is not None or self.tokens > x.shape[-1] // INPUTS_PER_TOKEN:
            self._condense()

    def _condense(self) -> None:
        width = self.x[0].shape[-1]
        if self.hessian is None:
            self.hessian = self.x[0].new_zeros(width, width)
        while self.x:
            x, shift = self.x.pop(), self.shifts.pop()
            self.hessian += product(x.T, x)
            if shift is not None:
                if self.shift is None:
                    self.shift = torch.zeros_like(self.hessian)
                self.shift += product(shift.T, x)


def round_layer(work: LayerWork, options: Options) -> None:
    """Round every linear layer of the scheme. Raises FourfoldError that names one whose inputs are not
    finite, or whose H stays without a Cholesky factor.
    """
    work.start_recalling()
    shared, seen = shared_inputs(work, list(work.schemes))
    originals: dict[str, torch.Tensor] = {}
    for names in portions(work, list(shared), options):
        statistics = collect(work, names, options, seen, originals)
        seen = {}  # from here on the layer is another
        for first in names:
            if first in statistics:  # an expert that no token reaches is left to be rounded to nearest
                apart = bool(options.asymmetry) and EXPERTS not in first
                if apart:
                    originals |= {name: work.linears[name].weight.data for name in shared[first]}
                round_together(work, shared[first], statistics.pop(first), options, apart)


def portions(work: LayerWork, names: list[str], options: Options) -> list[list[str]]:
    """``names`` by kind (``q_proj``, ``o_proj``, ...) as the kinds come, cut where their statistics would
    pass ``STATISTICS_BYTES`` together: the matrices of 256 experts are larger than the experts.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return [portion for alike in kinds.values() for portion in _cut(work, alike, options)]


def _cut(work: LayerWork, names: list[str], options: Options) -> list[list[str]]:
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


def shared_inputs(work: LayerWork, names: list[str]) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    """``names`` of one module put together where their inputs are equal, under the first of each; and the
    first batch's input [n, in] of each first, if it is at hand. Two experts may get the same tokens of that
    batch, and others later. Without experts it is the original model's batch, which will be run anyway.
    """
    seen: dict[str, torch.Tensor] = {}
    shared: dict[str, list[str]] = {}

    def see(name: str, x: torch.Tensor) -> None:
        scheme = work.schemes[name]
        for first, other in seen.items():
            if scheme == work.schemes[first] and _beside(name, first) and _equal(x, other):
                shared[first].append(name)
                return
        seen[name], shared[name] = x, [name]

    experts = any(EXPERTS in name for name in names)
    inputs = work.inputs if experts or work.base_inputs is None else work.base_inputs
    work.observe(names, see, inputs[:1])
    if inputs[0] is not work.inputs[0]:
        seen = {}
    for name in names:
        if not any(name in together for together in shared.values()):
            shared[name] = [name]
    return shared, seen


def _equal(x: torch.Tensor, other: torch.Tensor) -> bool:
    return x.shape == other.shape and (x.data_ptr() == other.data_ptr() or torch.equal(x, other))


def _beside(first: str, second: str) -> bool:
    return first.rpartition(".")[0] == second.rpartition(".")[0]


def collect(
    work: LayerWork,
    names: list[str],
    options: Options,
    seen: dict[str, torch.Tensor],
    originals: dict[str, torch.Tensor],
) -> dict[str, Statistics]:
    """What is needed of each of ``names`` over the calibration set. ``seen`` are inputs of the first batch,
    where they are at hand; ``originals`` the weights that have been rounded since.
    """
    found: dict[str, Statistics] = {}
    for batch, hidden in enumerate(work.inputs):
        base = _base_inputs(work, names, batch, originals) if options.asymmetry else {}
        same = bool(options.asymmetry) and base is None

        def see(
            name: str, x: torch.Tensor, base: dict[str, torch.Tensor] | None = base, same: bool = same
        ) -> None:
            served = work.linears[name].as_served(x).float()
            original = x if same and served is not x else (base or {}).pop(name, None)
            paired = original is not None and original.shape == served.shape and EXPERTS not in name
            shift = original.float() - served if paired and original is not None else None
            found.setdefault(name, Statistics()).add(served, shift)

        if batch == 0 and seen:
            for name in names:
                if name in seen:
                    see(name, seen.pop(name))
        else:
            work.observe(names, see, [hidden])
    return found


def _base_inputs(
    work: LayerWork, names: list[str], batch: int, originals: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The same tokens' inputs in the original model, None when nothing before was rounded."""
    assert work.base_inputs is not None
    if work.base_inputs[batch] is work.inputs[batch] and not work.blocks:
        return None
    base: dict[str, torch.Tensor] = {}
    # the two models send a token to different experts, so that their inputs cannot be paired
    paired = [name for name in names if EXPERTS not in name]
    if paired:
        with _weights(work, originals):
            work.observe(paired, base.__setitem__, [work.base_inputs[batch]])
    return base


@contextmanager
def _weights(work: LayerWork, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """The layer with other ``weights``, for a while."""
    held = {name: work.linears[name].weight.data for name in weights}
    try:
        for name, weight in weights.items():
            work.linears[name].weight.data = weight
        yield
    finally:
        for name, weight in held.items():
            work.linears[name].weight.data = weight


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float32. A GPU multiplies inputs as it does in the model, in bfloat16, which is fast."""
    if a.is_cuda:
        return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)
    return a @ b


def round_together(
    work: LayerWork, names: list[str], statistics: Statistics, options: Options, apart: bool
) -> None:
    """Round linear layers that share an input and a scheme; ``apart``: not where their weights are."""
    for name in names:
        check_finite(f"{name}.weight", work.linears[name].weight)
    weight = work.together(names, apart)
    rounded = round_in_place(names[0], weight, work.schemes[names[0]], statistics, options)
    start = 0
    for name in names:
        end = start + len(work.linears[name].weight)
        work.finish(name, rows_of(rounded, start, end), weight[start:end])
        start = end


def rows_of(tensor: BlockTensor, start: int, end: int) -> BlockTensor:
    """Rows ``start`` to ``end`` of ``tensor``; a scale of the whole tensor is shared."""
    scales = tensor.scales[start:end] if tensor.scales.ndim else tensor.scales
    return replace(tensor, blocks=tensor.blocks[start:end], scales=scales)


def gptq(
    name: str, weight: torch.Tensor, scheme: LayerScheme, statistics: Statistics, options: Options
) -> BlockTensor:
    """``weight`` [out, in] rounded to the scheme's format; ``statistics`` are used up."""
    own = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return round_in_place(name, own, scheme, statistics, options)


def round_in_place(
    name: str, weight: torch.Tensor, scheme: LayerScheme, statistics: Statistics, options: Options
) -> BlockTensor:
    """As ``gptq``, and the float32 ``weight`` becomes what it is rounded to."""
    block_format = get_format(scheme.weight)
    diagonal = mean_squares(name, statistics)
    order = column_order(diagonal, options)
    make = feedback_of(statistics, order, weight if options.sweeps else None, options)
    feedback = damped(name, float(diagonal.mean()), options.damping, make)
    grid = Grid(block_format, scheme.scale_rule, block_format.whole_scale(weight), options.search)
    columns = round_columns(weight, order, feedback, grid, options.sweeps)
    check_finite(f"{name}.weight, rounded,", columns.turned)
    return columns.put(weight)


def mean_squares(name: str, statistics: Statistics) -> torch.Tensor:
    """The diagonal of H [in]. Raises FourfoldError when an input is not finite."""
    if statistics.hessian is not None:
        total = statistics.hessian.diagonal().clone()
    else:
        total = torch.stack([x.square().sum(0) for x in statistics.x]).sum(0)
    shifts = [*statistics.shifts, statistics.shift]
    if not total.isfinite().all() or not all(s.isfinite().all() for s in shifts if s is not None):
        raise FourfoldError(
            f"The calibration inputs of {name} are not finite, or too large to be squared in float32, so "
            "that GPTQ cannot weigh its columns. Check that the original model gives finite outputs on this "
            f"calibration text, or add a `keep` entry '{name}' to the recipe and start anew."
        )
    return total / statistics.tokens


def feedback_of(
    statistics: Statistics, order: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> Callable[[float], Feedback | None]:
    """How to make the feedback in ``order`` with a given ridge, and with the ``weight`` [out, in] if there is
    to be descent. Takes the tensors out of ``statistics``.
    """
    if statistics.hessian is None:
        scale = statistics.tokens**-0.5
        x = torch.cat(statistics.x)[:, order].mul_(scale)
        shift = shifts_of(statistics)
        shift = None if shift is None else shift[:, order].mul_(scale * options.asymmetry)
        statistics.x, statistics.shifts = [], []
        wanted = None if shift is None or weight is None else shift @ turn(weight, order)
        return lambda ridge: TokenFeedback.make(x, shift, ridge, wanted)
    hessian, moved = statistics.hessian.div_(statistics.tokens), statistics.shift
    statistics.hessian = statistics.shift = None
    if moved is not None:
        moved.mul_(options.asymmetry / statistics.tokens)
    if options.order != "natural":
        hessian = hessian[order[:, None], order]
        moved = None if moved is None else moved[order[:, None], order]
    wanted = None if moved is None or weight is None else moved.T @ turn(weight, order)
    return lambda ridge: DenseFeedback.make(hessian, moved, ridge, wanted)


def shifts_of(statistics: Statistics) -> torch.Tensor | None:
    """The shifts [n, in] of all tokens, None where there are none."""
    if all(shift is None for shift in statistics.shifts):
        return None
    pairs = zip(statistics.shifts, statistics.x, strict=True)
    return torch.cat([torch.zeros_like(x) if shift is None else shift for shift, x in pairs])


Made = TypeVar("Made")


def damped(name: str, mean: float, damping: float, make: Callable[[float], Made | None]) -> Made:
    """What ``make(ridge)`` gives for a share ``damping`` of the ``mean`` diagonal, tenfold until it gives
    any. Raises FourfoldError with all that was tried. Inputs that are all zero weigh every error the same.
    """
    tried: list[float] = []
    while damping <= 1:
        tried.append(damping)
        made = make(damping * (mean or 1.0))
        if made is not None:
            return made
        damping *= 10
    raise FourfoldError(
        f"The Hessian of {name} is not positive definite, with damping {', '.join(f'{d:g}' for d in tried)} "
        "times its mean diagonal. Calibrate with more sequences (--samples), or set a larger `damping` of "
        "gptq in the recipe. A run that ends for another reason keeps its finished layers with --resume."
    )


def column_order(diagonal: torch.Tensor, options: Options) -> torch.Tensor:
    """Column numbers int64 [in]: as they are, or those with the largest inputs first."""
    if options.order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    return diagonal.argsort(descending=True, stable=True)


PASS = Pass(
    "gptq",
    "round",
    layer=round_layer,
    options=Options,
    needs_base=lambda o: o.asymmetry > 0,
    shows_base=True,
)
