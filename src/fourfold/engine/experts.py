"""Mixtures of experts: a router gives each token a few of many MLPs, and only those are computed.

    y = sum over the chosen experts e of share_e expert_e(x)

The router is computed in float32 whatever the dtype, since a rounding there is another expert. Rows are
gathered for each expert and added back in the experts' order, so a token's sum does not hang on who else is
in the batch. Checkpoints hold experts one by one, or all of a layer in two tensors [E, ...] (gpt-oss); here
each is a GatedMLP of its own, packed as held, a view into the fused tensor where its rows need no sorting,
and read when it is needed: one expert after the other, whatever a layer of them takes.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fourfold.engine.layers import GatedMLP, Gating, Linear, Unread
from fourfold.engine.shape import ExpertShape
from fourfold.engine.weights import Weights
from fourfold.formats import BlockTensor


@dataclass(frozen=True, slots=True)
class Experts:
    """What an architecture says of a layer's experts. Names stand after the layer's prefix.

    ``projections`` are those of one expert: gate, up and down. ``interleaved``: the rows of a fused
    gate_up_proj are gate, up, gate, up. ``transposed``: fused tensors are [E, in, out], unless in blocks.
    ``among_chosen``: as in MixtureOfExperts. ``bias``: of the router and of every projection.
    """

    shape: ExpertShape
    gating: Gating
    among_chosen: bool = True
    bias: bool = False
    router: str = "mlp.gate"
    module: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False
    transposed: bool = False


class MixtureOfExperts:
    """``top_k`` of ``experts`` for each token, by a float32 ``router``.

    ``among_chosen``: shares are the softmax over the logits of the chosen, which is the same as those of the
    softmax over all brought to a sum of 1; else they are left as the softmax over all has them.
    """

    __slots__ = ("among_chosen", "experts", "router", "top_k")

    def __init__(self, router: Linear, experts: list[GatedMLP], top_k: int, among_chosen: bool = True):
        self.router, self.experts, self.top_k, self.among_chosen = router, experts, top_k, among_chosen

    def __call__(self, x: Tensor) -> Tensor:
        """X [T, hidden] -> float32 [T, hidden]."""
        logits = self.router(x.float())
        best, chosen = logits.topk(self.top_k)
        shares = best.softmax(-1) if self.among_chosen else logits.softmax(-1).gather(1, chosen)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert, slots in zip(self.experts, order.split(counts), strict=True):
            if len(slots):
                rows = slots // self.top_k
                out.index_add_(0, rows, expert(x[rows]).float() * shares.flatten()[slots, None])
        return out


def build_experts(weights: Weights, prefix: str, hidden: int, said: Experts) -> MixtureOfExperts:
    """The experts of the layer ``prefix``, which holds them in one of two ways."""
    size = (said.shape.count, hidden)
    router = weights.linear(prefix + said.router, *size, said.bias)
    if router.format is None:
        router.weight = weights.values(f"{prefix}{said.router}.weight", size)
    module = prefix + said.module
    read = fused if weights.has(module + ".gate_up_proj") else one_by_one
    return MixtureOfExperts(router, read(weights, module, hidden, said), said.shape.chosen, said.among_chosen)


def one_by_one(weights: Weights, module: str, hidden: int, said: Experts) -> list[GatedMLP]:
    """Experts ``module``.0 and so on, each with linear layers of its own."""
    gate, up, down = said.projections
    width, bias = said.shape.width, said.bias
    return [
        GatedMLP(
            weights.fused(f"{module}.{number}.", {gate: width, up: width}, hidden, bias),
            weights.linear(f"{module}.{number}.{down}", hidden, width, bias),
            said.gating,
        )
        for number in range(said.shape.count)
    ]


def fused(weights: Weights, module: str, hidden: int, said: Experts) -> list[GatedMLP]:
    """Experts in ``module``.gate_up_proj [E, 2 I, H] and .down_proj [E, H, I], as far as not transposed."""
    count, width = said.shape.count, said.shape.width
    gate_up = stacked(weights, f"{module}.gate_up_proj", (count, 2 * width, hidden), said, said.interleaved)
    down = stacked(weights, f"{module}.down_proj", (count, hidden, width), said)
    return [GatedMLP(*pair, said.gating) for pair in zip(gate_up, down, strict=True)]


def stacked(
    weights: Weights, name: str, shape: tuple[int, int, int], said: Experts, interleaved: bool = False
) -> list[Linear]:
    """The linear layers in the tensor ``name`` of logical ``shape`` [E, out, in], biases ``name``_bias."""
    count, rows, columns = shape
    transposed = said.transposed and not weights.is_packed(name)
    order = [slice(0, None, 2), slice(1, None, 2)] if interleaved else [slice(None)]

    def read(number: int) -> Tensor | BlockTensor:
        held = weights.held(name, (count, columns, rows) if transposed else shape)
        if isinstance(held, Tensor) and transposed:
            held = held.mT
        return weights.cast(expert_rows(held, number, order))

    offsets = weights.values(f"{name}_bias", (count, rows)) if said.bias else None
    activation, form = weights.activation(name), weights.format(name)
    linears = [
        Linear(
            Unread(f"{name}.{number}", (rows, columns), form, partial(read, number)),
            None if offsets is None else torch.cat([offsets[number, part] for part in order]),
            activation,
        )
        for number in range(count)
    ]
    weights.unread += linears
    return linears


def expert_rows(held: Tensor | BlockTensor, number: int, order: list[slice]) -> Tensor | BlockTensor:
    """One matrix of a stack, its rows those of ``order``'s slices one after the other, contiguous."""

    def take(stack: Tensor) -> Tensor:
        parts = [stack[number, part] for part in order]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    if isinstance(held, Tensor):
        return take(held)
    return replace(held, blocks=take(held.blocks), scales=take(held.scales))
