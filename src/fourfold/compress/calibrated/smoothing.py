"""What smoothing passes look at, and how far off a group's outputs are under given scales.

With scales s, a linear layer's rounded output is A(x / s) Q(s W)^T, A and Q being the formats of the scheme
(and both turned first, where a rotation will follow). Its error against x W^T is e (sW)^T + A(x/s) D^T, with
e = x/s - A(x/s) and D = sW - Q(sW): one product L R^T of [e, A(x/s)] and [sW, D]. Formats round blocks of
channels by themselves, so the squared error of one block's part, <L^T L, R^T R>, needs only two small Gram
matrices, and every block may choose its own scales. What errors of different blocks do to each other is left
out there; ``whole_error`` has it, and decides in the end, on other rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from fourfold.compress.calibrated.experts import Expert
from fourfold.compress.calibrated.folding import Fold, fold_all
from fourfold.compress.calibrated.groups import Group, find_groups
from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.work import LayerWork
from fourfold.core.quantization import LayerScheme
from fourfold.formats import get_format, hadamard, turn

OBSERVED_TOKENS = 2**17
ROWS = 1024  # of each linear layer's input, kept for the search
WIDEST = 1e3  # a channel that is silent in calibration need not be so later
SEARCHED_EXPERTS = 8  # the busiest ones speak for the others


@dataclass(eq=False)
class Seen:
    """What reached one linear layer: ``rows`` [n, in] evenly spread over it; per channel the largest
    magnitude and the sum of magnitudes over ``tokens`` tokens.
    """

    largest: torch.Tensor
    total: torch.Tensor
    tokens: int = 0
    kept: list[torch.Tensor] = field(default_factory=list)

    @property
    def rows(self) -> torch.Tensor:
        """The kept rows, float32."""
        return torch.cat(self.kept)

    def add(self, x: torch.Tensor, keep: int) -> None:
        """Take in one batch, and keep ``keep`` of its rows."""
        if not len(x):
            return
        x = x.float()
        magnitude = x.abs()
        self.largest = torch.maximum(self.largest, magnitude.amax(0))
        self.total = self.total + magnitude.sum(0)
        self.tokens += len(x)
        self.kept.append(x[:: -(-len(x) // keep)].clone())


@dataclass(frozen=True, eq=False)
class Member:
    """One rounded reader of a group, by its name in the checkpoint."""

    name: str
    linear: CalibratedLinear
    scheme: LayerScheme
    seen: Seen

    @property
    def rotation(self) -> torch.Tensor | None:
        """What will turn its input; a Hadamard matrix stands in for one that is not known yet."""
        if self.linear.rotation is None and self.scheme.input_transform is not None:
            return hadamard().to(self.linear.weight.device)
        return self.linear.rotation


Pick = Callable[[Group, list[Member]], torch.Tensor | None]
"""Chooses the scales [channels] of a group from its rounded readers; None leaves the group as it is."""


@torch.no_grad()
def smooth(work: LayerWork, pick: Pick) -> None:
    """Scale every group of ``work`` as ``pick`` says."""
    trace = find_groups(work)
    members = observe(work, trace.groups)
    picked = [(group, pick(group, members[group.source])) for group in trace.groups]
    fold_all(work, trace, [Fold(group, scales) for group, scales in picked if scales is not None])


def observe(work: LayerWork, groups: list[Group]) -> dict[str, list[Member]]:
    """The rounded readers of every group, by its source, with what reached them. Runs the layer once."""
    names = {id(linear): name for name, linear in work.linears.items()}
    rounded = {
        group.source: [
            name
            for reader in group.readers
            if (name := names.get(id(work.module.get_submodule(reader)))) in work.schemes and name is not None
        ]
        for group in groups
    }
    speakers = {
        name: speaker for group in groups for name, speaker in _speakers(work, group, rounded).items()
    }
    seen = {s: _empty(work.linears[s]) for s in set(speakers.values())}
    inputs = _spread_out(work.inputs)
    keep = -(-ROWS // len(inputs))
    work.observe(seen, lambda name, x: seen[name].add(x, keep), inputs)
    return {
        source: [Member(n, work.linears[n], work.schemes[n], seen[speakers[n]]) for n in members]
        for source, members in rounded.items()
    }


def _speakers(work: LayerWork, group: Group, rounded: dict[str, list[str]]) -> dict[str, str]:
    """For every rounded reader, the one whose input is its own too: one a group, and one an expert."""
    owner_of = {
        id(linear): expert
        for expert in work.module.modules()
        if isinstance(expert, Expert)
        for linear in expert.children()
    }
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(owner_of.get(id(work.linears[name]))), name)
        for name in rounded[group.source]
    }


def _empty(linear: CalibratedLinear) -> Seen:
    zeros = torch.zeros(linear.in_features, device=linear.weight.device)
    return Seen(zeros, zeros)


def _spread_out(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    tokens = sum(hidden.shape[0] * hidden.shape[1] for hidden in inputs)
    return inputs[:: max(1, tokens // OBSERVED_TOKENS)]


def channel_largest(group: Group, members: list[Member]) -> torch.Tensor:
    """Largest input magnitude [channels] of each of the source's channels."""
    return _by_channel(group, [m.seen.largest for m in members], "amax")


def channel_mean(group: Group, members: list[Member]) -> torch.Tensor:
    """Mean input magnitude [channels] of each of the source's channels."""
    total = torch.stack([m.seen.total for m in members]).sum(0)
    tokens = max(1, sum(m.seen.tokens for m in members))
    return _by_channel(group, [total / tokens], "mean")


def weight_largest(group: Group, members: list[Member]) -> torch.Tensor:
    """Largest weight magnitude [channels] that multiplies each of the source's channels."""
    return _by_channel(group, [m.linear.weight.abs().amax(0) for m in members], "amax")


def _by_channel(group: Group, values: list[torch.Tensor], reduce: str) -> torch.Tensor:
    stacked = torch.stack(values).amax(0)
    result = torch.zeros(group.channels, device=stacked.device)
    return result.scatter_reduce(0, group.spread.to(stacked.device), stacked, reduce, include_self=False)


def balanced(scales: torch.Tensor) -> torch.Tensor:
    """``scales`` with 1 as their geometric mean, within 1 to ``WIDEST`` of it; 1 where there are none."""
    usable = scales.isfinite() & (scales > 0)
    if not usable.any():
        return torch.ones_like(scales)
    middle = scales[usable].log().mean().exp()
    return torch.where(usable, scales / middle, 1).clamp(1 / WIDEST, WIDEST)


class OutputError:
    """The error of a group's rounded outputs as a function of its scales [channels], each linear layer's
    relative to its own output. ``activations``: whether inputs are rounded too, as the scheme says. ``rows``:
    which of the kept rows count.
    """

    def __init__(self, group: Group, members: list[Member], *, activations: bool, rows: slice):
        self.members = _searched(members)
        self._rows = {id(m.seen): m.seen.rows[rows] for m in self.members}
        self.activations = activations
        device = members[0].linear.weight.device
        self.spread = group.spread.to(device)
        self.channels = group.channels
        self.cell = self._cell()
        self.cells = self.spread[:: self.cell] // self.cell
        if not self._cells_stay_whole():
            self.cell = self.channels
            self.cells = torch.zeros(1, dtype=torch.int64, device=device)
        self._signals = [(self._rows[id(m.seen)] @ m.linear.weight.T).square().sum() for m in self.members]

    @property
    def ready(self) -> bool:
        """Whether anything reached the layers, so that there is an error to speak of."""
        return bool(self.members) and all(bool(signal > 0) for signal in self._signals)

    def by_cell(self, scales: torch.Tensor) -> torch.Tensor:
        """Squared relative errors [source cells], each from its own channels alone."""
        if len(self.cells) == 1:
            return torch.tensor([self.whole_error(scales)], device=scales.device)
        result = torch.zeros(self.channels // self.cell, device=scales.device)
        for left, right, signal in self._products(scales):
            errors = (_gram(left, self.cell) * _gram(right, self.cell)).sum((1, 2)) / signal
            result.index_add_(0, self.cells, errors)
        return result

    def whole_error(self, scales: torch.Tensor) -> float:
        """The squared relative error, summed over the linear layers."""
        total = 0.0
        for left, right, signal in self._products(scales):
            product = sum(a @ b.T for a, b in zip(left, right, strict=True))
            total += float(torch.as_tensor(product).square().sum() / signal)
        return total

    def _products(
        self, scales: torch.Tensor
    ) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]]:
        """For each linear layer [e, A(x/s)], [sW, D] and its output's power; without e and sW where inputs
        are not rounded.
        """
        wide = scales[self.spread]
        inputs: dict[tuple[int, str | None, bool], list[torch.Tensor]] = {}
        for member, signal in zip(self.members, self._signals, strict=True):
            rotation, activation = member.rotation, self._activation(member)
            key = id(member.seen), activation, rotation is not None
            if key not in inputs:
                x = _turned(self._rows[id(member.seen)] / wide, rotation)
                inputs[key] = [x]
                if activation is not None:
                    rounded = get_format(activation).fake_quantize(x)
                    inputs[key] = [x - rounded, rounded]
            weight = _turned(member.linear.weight * wide, rotation)
            lost = weight - get_format(member.scheme.weight).fake_quantize(weight, member.scheme.scale_rule)
            yield inputs[key], [lost] if activation is None else [weight, lost], signal

    def _activation(self, member: Member) -> str | None:
        return member.scheme.activation if self.activations else None

    def _cell(self) -> int:
        """Channels that round together, with no others."""
        sizes = []
        for member in self.members:
            formats = [member.scheme.weight, self._activation(member)]
            sizes += [get_format(f).block_size or len(self.spread) for f in formats if f is not None]
            sizes += [] if member.rotation is None else [len(member.rotation)]
        return max(sizes, default=self.channels)

    def _cells_stay_whole(self) -> bool:
        if self.channels % self.cell or len(self.spread) % self.cell:
            return False
        inside = torch.arange(self.cell, device=self.spread.device)
        return torch.equal(self.spread.view(-1, self.cell), self.cells[:, None] * self.cell + inside)


def choose(
    group: Group,
    members: list[Member],
    candidates: list[torch.Tensor],
    *,
    activations: bool,
    each_cell: bool,
) -> torch.Tensor | None:
    """The candidate with the least error, or with ``each_cell`` the best one of every cell; ones if no
    scaling is better, None if nothing reached the layers. Half of the rows propose, the other half decide.
    """
    error = OutputError(group, members, activations=activations, rows=slice(0, None, 2))
    judge = OutputError(group, members, activations=activations, rows=slice(1, None, 2))
    if not (error.ready and judge.ready):
        return None
    candidates = [torch.ones_like(candidates[0]), *candidates]
    errors = torch.stack([error.by_cell(scales) for scales in candidates])
    finalists = [candidates[0], candidates[int(errors.sum(1).argmin())]]
    if each_cell:
        best = errors.argmin(0).repeat_interleave(error.cell)
        finalists.append(torch.stack(candidates).gather(0, best[None])[0])
    return min(finalists, key=judge.whole_error)


def _searched(members: list[Member]) -> list[Member]:
    """All members whose input is shared, and the busiest of those that see their own tokens only."""
    busiest = sorted({id(m.seen): m.seen for m in members}.values(), key=lambda seen: -seen.tokens)
    chosen = {id(seen) for seen in busiest[: SEARCHED_EXPERTS + 1] if seen.tokens}
    return [m for m in members if id(m.seen) in chosen]


def _turned(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    return x if rotation is None else turn(x, rotation)


def _gram(parts: list[torch.Tensor], width: int) -> torch.Tensor:
    """[cells, k, k] of parts [n, in], the k columns of a cell being ``width`` of each part."""
    cells = torch.cat([part.unflatten(1, (-1, width)) for part in parts], -1).transpose(0, 1)
    return cells.mT @ cells
