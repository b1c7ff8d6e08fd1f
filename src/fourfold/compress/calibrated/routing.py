"""What the router leaves each expert of the calibration set, and more for those that it starves.

Before passes see a layer, its router runs over the calibration set and nothing else of its experts does. An
expert that fewer than ``enough`` tokens reach is starved: an eighth of its widest input, and at least 64.
Below that, damping decides more of a Hessian than data does. Whenever the layer is observed, a starved expert
is also run on the tokens for which the router gave it the highest probability without choosing it, until it
has enough; they weigh as much as its own. This changes what is observed, never what the layer computes.

The routing of that run is laid down for every observation, over the quantized model's inputs and the original
one's alike, so that their rows are the same tokens. Price: one run of the layer without its experts, and
tokens x k x 2 bytes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fourfold.compress.calibrated.experts import Plan, SeparateExperts
from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.core.records import Record

LEAST, SHARE_OF_INPUTS = 64, 8
NAMED = 8  # experts that a note names


class ExpertTokens(Record):
    """Tokens that the experts of one layer saw: ``tokens`` by the router's choice, ``extra`` beyond it."""

    experts: str
    enough: int
    tokens: list[int]
    extra: dict[int, int] = {}

    @property
    def starved(self) -> list[int]:
        """Experts with too few tokens of their own."""
        return [expert for expert, own in enumerate(self.tokens) if own < self.enough]

    @property
    def still_starved(self) -> list[int]:
        """Experts with too few tokens even with the extra ones."""
        return [e for e in self.starved if self.tokens[e] + self.extra.get(e, 0) < self.enough]


class Survey:
    """Listens to the routing of one layer's experts over the calibration set, batch after batch."""

    def __init__(self, experts: SeparateExperts):
        first = next(iter(experts))
        widest = max(first.up_proj.in_features, first.down_proj.in_features)
        self.enough = max(LEAST, widest // SHARE_OF_INPUTS)
        self.counts = torch.zeros(len(experts), dtype=torch.int64)
        self._chosen: list[torch.Tensor] = []
        # the best tokens that each expert missed: probability and position [E, <= enough]
        self._best = torch.empty(len(experts), 0)
        self._where = torch.empty(len(experts), 0, dtype=torch.int64)

    def see(self, chosen: torch.Tensor, logits: torch.Tensor | None) -> None:
        """The experts chosen in a batch [tokens, k], and the router's logits [tokens, E]."""
        chosen = chosen.detach()
        first = sum(len(batch) for batch in self._chosen)
        self._chosen.append(chosen.to("cpu", torch.int16))
        self.counts += chosen.flatten().bincount(minlength=len(self.counts)).cpu()
        if logits is None or len(logits) != len(chosen):
            return
        missed = logits.float().softmax(-1).scatter(1, chosen, -1.0).T
        where = torch.arange(first, first + len(chosen), device=missed.device).expand_as(missed)
        best = torch.cat([self._best.to(missed.device), missed], 1)
        self._best, kept = best.topk(min(self.enough, best.shape[1]))
        self._where = torch.cat([self._where.to(missed.device), where], 1).gather(1, kept)

    def plans(self) -> list[Plan]:
        """The routing of each batch, with the extra tokens of starved experts."""
        best = self._where.cpu()
        extra = {expert: best[expert][: self._wanted(expert)] for expert in range(len(self.counts))}
        plans, first = [], 0
        for chosen in self._chosen:
            end = first + len(chosen)
            here = {e: where[(where >= first) & (where < end)] - first for e, where in extra.items()}
            plans.append(Plan(chosen, {e: tokens.sort().values for e, tokens in here.items() if len(tokens)}))
            first = end
        return plans

    def record(self, name: str) -> ExpertTokens:
        """The count for the experts ``name``."""
        extra = {e: wanted for e in range(len(self.counts)) if (wanted := self._wanted(e))}
        return ExpertTokens(experts=name, enough=self.enough, tokens=self.counts.tolist(), extra=extra)

    def _wanted(self, expert: int) -> int:
        missing = max(0, self.enough - int(self.counts[expert]))
        return min(missing, int((self._best[expert] >= 0).sum()))


class Routing:
    """The laid-down routing of a layer's experts, by the batches it was found for. ``after`` are the linear
    layers that ran once the experts had, and may depend on them.
    """

    def __init__(
        self,
        plans: dict[SeparateExperts, list[Plan]],
        batches: Iterable[list[torch.Tensor]],
        after: set[CalibratedLinear],
    ):
        self._plans, self._after = plans, after
        self._numbers = {id(batch): number for one in batches for number, batch in enumerate(one)}

    def lay_down(self, hidden: torch.Tensor) -> None:
        """Route as planned for the batch ``hidden``; for one that is not known, as the router says."""
        number = self._numbers.get(id(hidden))
        for experts, plans in self._plans.items():
            experts.plan = None if number is None else plans[number]

    @contextmanager
    def observing(self, watched: Iterable[CalibratedLinear]) -> Iterator[None]:
        """While only what ``watched`` see matters, experts run where they must, and as laid down."""
        needless = len(self._plans) == 1 and self._after.isdisjoint(watched)
        for experts in self._plans:
            experts.only_observed = needless
        try:
            yield
        finally:
            for experts in self._plans:
                experts.plan, experts.only_observed = None, False


def survey(module: nn.Module, batches: Iterable[torch.Tensor], run: Callable[[torch.Tensor], object]):
    """Run a layer over ``batches`` with its experts only counting. Returns a Survey of each experts module,
    and the linear layers that ran after the experts.
    """
    surveys = {experts: Survey(experts) for experts in experts_of(module)}
    after: set[CalibratedLinear] = set()
    linears = [child for child in module.modules() if isinstance(child, CalibratedLinear)]
    for experts, one in surveys.items():

        def count(chosen: torch.Tensor, logits: torch.Tensor | None, one: Survey = one) -> None:
            after.clear()
            one.see(chosen, logits)

        experts.count_only = count
    for linear in linears if surveys else ():
        linear.observer = lambda x, linear=linear: after.add(linear)
    try:
        for hidden in batches if surveys else ():
            run(hidden)
    finally:
        for linear in linears:
            linear.observer = None
        for experts in surveys:
            experts.count_only = None
    return surveys, after


def experts_of(module: nn.Module) -> list[SeparateExperts]:
    """The separate experts of a layer."""
    return [child for child in module.modules() if isinstance(child, SeparateExperts)]


def summarise(found: list[ExpertTokens]) -> list[str]:
    """What a reader of the checkpoint must know of its experts' calibration."""
    if not found:
        return []
    every = sorted(own for layer in found for own in layer.tokens)
    notes = [
        f"Calibration: the router sent each of {len(every)} experts {every[0]} to {every[-1]} tokens (median "
        f"{every[len(every) // 2]})."
    ]
    if starved := _named(found, "starved"):
        notes.append(
            f"Experts with few tokens of their own, calibrated on the tokens that the router ranks next as "
            f"well: {starved}."
        )
    if still := _named(found, "still_starved"):
        notes.append(f"Experts that stayed starved, and are rounded with little or no data: {still}.")
    return notes


def _named(found: list[ExpertTokens], which: str) -> str:
    names = [
        f"{layer.experts}.{e} ({layer.tokens[e]} of {layer.enough})"
        for layer in found
        for e in getattr(layer, which)
    ]
    more = f" and {len(names) - NAMED} more, which fourfold.json lists" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
