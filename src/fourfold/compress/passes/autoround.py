"""AutoRound: learn how each weight of a decoder layer is rounded, by the signs of gradients.

Per layer, an offset for every weight and a scale for every block are learned by SignSGD with a linearly
decaying step, so that the quantized layer, given what the quantized layers before it hand on, gives what
the original layer gives (Cheng et al., arXiv:2309.05516; 200 steps as there). Activation formats of the
scheme are simulated while learning. ``loss: relative`` divides each token's squared error by its squared
output: a norm follows, so that an error matters in proportion, and the few tokens with huge values do not
drown the others; ``plain`` is the paper's. ``scales: search`` starts from the exponents that ``mse-scale``
would choose, ``rule`` from those of the scheme's rule. ``start: gptq`` rounds the layer by GPTQ first and
learns from there.

A step sees one batch of the calibration set (4096 tokens on a CPU, 16384 on a GPU), in an order drawn from
``seed``. Of the start and of ``checks`` later points the best on up to eight batches is kept, so that a
layer never gets worse there than where it started. The price is about three runs of the layer a step.
"""

from math import isfinite
from typing import Literal

import torch
from pydantic import Field

from fourfold.compress.calibrated.learned_rounding import LearnedRounding
from fourfold.compress.calibrated.scale_search import mean_squares, search_scales
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.passes import gptq
from fourfold.compress.passes.rtn import round_to_nearest
from fourfold.compress.pipeline import Pass
from fourfold.core.errors import FourfoldError
from fourfold.core.records import Record
from fourfold.formats import BlockTensor, get_format

CHECK_BATCHES = 8


class Options(Record):
    """``lr`` is the first step's size in rounding steps (default 1 / steps, a twentieth of it from ``gptq``);
    ``scale_lr`` that of the scales' base-2 logarithm, by default the same; 0 leaves the scales as
    they start. ``reach`` bounds the offset: half a step from ``rtn``, where it only chooses up or
    down, and 16 from ``gptq``, by default, as GPTQ moves values far to make up for others.
    """

    steps: int = Field(200, ge=1)
    lr: float | None = Field(None, gt=0)
    scale_lr: float | None = Field(None, ge=0)
    reach: float | None = Field(None, gt=0, le=16)
    start: Literal["rtn", "gptq"] = "rtn"
    scales: Literal["search", "rule"] = "search"
    loss: Literal["relative", "plain"] = "relative"
    checks: int = Field(10, ge=1)
    seed: int = 0


def round_layer(work: LayerWork, options: Options) -> None:
    """Finish every weight of the layer that the scheme names. Raises FourfoldError for NaN or Inf in one."""
    if not work.schemes:
        return
    learned = start_at_gptq(work, options) if options.start == "gptq" else start_nearest(work, options)
    assert work.base_inputs is not None, "the pass asks for base inputs"
    targets = work.outputs(work.base_inputs)
    served = {name: work.linears[name].rounds_input for name in work.schemes}
    for name, rounding in learned.items():
        work.linears[name].rounds_input = True
        rounding.linear.weight.requires_grad_(True)
    best, first, last = learn(work, learned, targets, options)
    for name, rounding in learned.items():
        work.linears[name].rounds_input = served[name]
        rounding.linear.weight.requires_grad_(False)
        rounding.linear.weight.grad = None
        work.finish(name, best[name])
    work.notes.append(
        f"{work.prefix}: autoround brought the loss of the layer from {first:.4g} to {last:.4g}"
    )


def start_at_gptq(work: LayerWork, options: Options) -> dict[str, LearnedRounding]:
    """A LearnedRounding for each weight to be rounded, at what GPTQ makes of it."""
    original = {name: work.linears[name].weight.detach().clone() for name in work.schemes}
    gptq.round_layer(work, gptq.Options.model_validate({}))
    work.round_rest(round_to_nearest)  # an expert that no token reaches
    work.stop_recalling()
    learned = {}
    for name, scheme in work.schemes.items():
        linear, blocks = work.linears[name], work.blocks.pop(name)
        linear.weight.data.copy_(original[name])
        learned[name] = LearnedRounding(linear, scheme, blocks.scales, options.reach or 16.0)
        learned[name].start_at(blocks.dequantize())
    return learned


def start_nearest(work: LayerWork, options: Options) -> dict[str, LearnedRounding]:
    """A LearnedRounding for each weight to be rounded, at the nearest values under the scheme's rule or under
    searched scales.
    """
    nearest = {
        name: round_to_nearest(f"{name}.weight", work.linears[name].weight.detach(), scheme)
        for name, scheme in work.schemes.items()
    }
    importance = mean_squares(work) if options.scales == "search" else None
    learned = {}
    for name, scheme in work.schemes.items():
        linear, start = work.linears[name], nearest[name].scales
        if importance is not None:
            start = search_scales(linear.weight.detach(), get_format(scheme.weight), importance[name])
        learned[name] = LearnedRounding(linear, scheme, start, options.reach or 0.5)
    return learned


def learn(
    work: LayerWork, learned: dict[str, LearnedRounding], targets: list[torch.Tensor], options: Options
) -> tuple[dict[str, BlockTensor], float, float]:
    """The best blocks that were seen, with the losses of the start and of the best.

    Raises FourfoldError when that of the start is no number.
    """
    lr = options.lr or (1.0 if options.start == "rtn" else 0.05) / options.steps
    scale_lr = lr if options.scale_lr is None else options.scale_lr
    order = batch_order(len(work.inputs), options.steps, options.seed + work.index)
    best, first, least = {}, float("nan"), float("inf")
    check_at = {round(k * options.steps / options.checks) for k in range(options.checks + 1)}
    for step in range(options.steps + 1):
        for rounding in learned.values():
            rounding.write()
        if step in check_at:
            loss = check(work, targets, options.loss)
            first = loss if step == 0 else first
            if not isfinite(first):
                raise FourfoldError(
                    f"The loss of {work.prefix} is {first} before 'autoround' takes a step: the original "
                    "model computes no finite numbers on this calibration text. `fourfold evaluate` the "
                    "original, or use another text."
                )
            if not best or loss < least:
                least, best = loss, {name: rounding.blocks() for name, rounding in learned.items()}
        if step < options.steps:
            left = 1 - step / options.steps
            take_step(work, learned, targets, order[step], options.loss, lr * left, scale_lr * left)
    return best, first, least


def take_step(
    work: LayerWork,
    learned: dict[str, LearnedRounding],
    targets: list[torch.Tensor],
    batch: int,
    kind: str,
    lr: float,
    scale_lr: float,
) -> None:
    """One SignSGD step on one batch."""
    with torch.enable_grad():
        loss_of(work.forward(work.inputs[batch]), targets[batch], kind).backward()
    for rounding in learned.values():
        gradients = rounding.gradients()
        if gradients is not None:
            rounding.move(gradients, lr, scale_lr)
        rounding.linear.weight.grad = None


@torch.no_grad()
def check(work: LayerWork, targets: list[torch.Tensor], kind: str) -> float:
    """The mean loss over the first batches."""
    losses = [
        loss_of(work.forward(hidden), target, kind)
        for hidden, target in list(zip(work.inputs, targets, strict=True))[:CHECK_BATCHES]
    ]
    return torch.stack(losses).mean().item()


def loss_of(output: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean squared error of the outputs [B, T, H]; relative: a share of each token's mean square."""
    target = target.to(output.device, torch.float32)
    error = (output - target).square().mean(-1)
    if kind == "relative":
        error = error / target.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return error.mean()


def batch_order(batches: int, steps: int, seed: int) -> list[int]:
    """Which batch each step sees: all of them in a drawn order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(batches, generator=generator).tolist()
    return order[:steps]


PASS = Pass("autoround", "round", layer=round_layer, options=Options, needs_base=lambda options: True)
