"""Learn the rounding of all layers together, on the original model's logits.

Offsets of all weights and scales of all blocks, as in ``autoround``, are learned by Adam to minimise the
Kullback-Leibler divergence of the quantized model's next-token distribution from the original's, with
gradients straight through every rounding (distillation as in LLM-QAT, Liu et al., arXiv:2305.17888, with
AutoRound's bounded parameters, arXiv:2309.05516). Layers can make up for each other, which no method that
goes layer by layer lets them. ``norms`` also learns the norm weights of the decoder layers, which are kept
in their own dtype. Activation formats are simulated. ``start: gptq`` rounds layer by layer first and learns
from there, ``autoround`` does so from GPTQ and AutoRound.

Few tokens tell little about many weights: the last ``holdout`` share of the sequences is never learned
from, and of the start and ``checks`` later points the one with the smallest divergence there is kept;
``decay`` pulls the offsets back to round-to-nearest. Only ``block-rotation`` may come before it: what is
learned is a rounding of the weights as they are in the checkpoint.

The price: original and quantized model in memory with everything that training needs, about 32 bytes a
parameter and the activations of ``micro`` sequences. For what does not fit there are ``gptq`` and
``autoround``.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from fourfold.compress.calibrated.learned_rounding import LearnedRounding
from fourfold.compress.calibrated.loop import LayerLoop
from fourfold.compress.calibrated.scale_search import MeanSquares, search_scales
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.store import LayerStore
from fourfold.compress.calibrated.whole import WholeModel
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.passes.rtn import check_finite
from fourfold.compress.pipeline import Pass
from fourfold.compress.recipe import Recipe
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.records import Record
from fourfold.formats import BlockTensor, get_format

SEARCH_SEQUENCES = 32
BLOCKS, SCALES, WHOLE, TOTAL, NORM, REPORT = (
    ".blocks",
    ".scales",
    ".global_scale",
    ".total",
    ".norm",
    "report",
)


class Options(Record):
    """``lr`` (in rounding steps; default 0.1 / steps, from ``rtn`` 2 / steps), ``scale_lr`` (default lr, in
    powers of two) and ``norm_lr`` (relative) are Adam's first steps; they decay linearly to zero. A
    step sees ``sequences`` sequences, ``micro`` at a time.
    """

    steps: int = Field(300, ge=1)
    sequences: int = Field(8, ge=1)
    micro: int = Field(4, ge=1)
    lr: float | None = Field(None, gt=0)
    scale_lr: float | None = Field(None, ge=0)
    norms: bool = False
    norm_lr: float = Field(1e-3, gt=0)
    decay: float = Field(0.0, ge=0)
    reach: float | None = Field(None, gt=0, le=4)
    scales: Literal["search", "rule"] = "search"
    start: Literal["rtn", "gptq", "autoround"] = "gptq"
    holdout: float = Field(0.1, gt=0, lt=1)
    checks: int = Field(10, ge=1)
    seed: int = 0


@dataclass
class Student:
    """The quantized model while it is learned: what is learned, and how far its optimiser has come."""

    model: WholeModel
    roundings: dict[str, LearnedRounding]
    norms: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer

    def write(self) -> None:
        """Let the model compute with the rounded weights."""
        for rounding in self.roundings.values():
            rounding.write()

    def step(self, share: float) -> None:
        """One step against the gradients that the weights hold, ``share`` of the first step's size."""
        for rounding in self.roundings.values():
            gradients = rounding.gradients()
            rounding.linear.weight.grad = None
            rounding.offset.grad, rounding.log2_scale.grad = gradients or (None, None)
        for group in self.optimizer.param_groups:
            group["lr"] = group["first_lr"] * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        for rounding in self.roundings.values():
            rounding.confine()

    def snapshot(self) -> dict[str, torch.Tensor]:
        """What has been learned, as ``learn`` returns it."""
        kept = {name: norm.detach().clone() for name, norm in self.norms.items()}
        for name, rounding in self.roundings.items():
            blocks = rounding.blocks()
            kept |= {name + BLOCKS: blocks.blocks, name + SCALES: blocks.scales}
            if blocks.global_scale is not None:
                kept[name + WHOLE] = blocks.global_scale
        return kept


def learn(skeleton: Skeleton, calibration: CalibrationSet, options: Options) -> dict[str, torch.Tensor]:
    """Per weight its final ``.blocks``, ``.scales`` and a ``.total`` that tells which weight they are for.

    Raises UsageError for fewer than two sequences, FourfoldError for NaN or Inf in a weight and when the
    GPU's memory is not enough.
    """
    try:
        return _learn(skeleton, calibration, options)
    except torch.OutOfMemoryError as error:
        raise FourfoldError(
            f"The GPU ran out of memory while 'kl-round' learned on {options.micro} sequences of "
            f"{calibration.token_ids.shape[1]} tokens at a time ({str(error).splitlines()[0]}). Lower "
            "`micro` or --sequence-tokens; if it is the model that does not fit, use `autoround`."
        ) from error


def _learn(skeleton: Skeleton, calibration: CalibrationSet, options: Options) -> dict[str, torch.Tensor]:
    train_ids, held = split(calibration, options)
    train = CalibrationSet(train_ids, calibration.source, calibration.seed)
    base, model = WholeModel(skeleton), WholeModel(skeleton)
    model.rotate()
    totals = {name + TOTAL: total(model.linears[name].weight) for name in model.schemes}
    student = start(skeleton, model, train, options)
    order = torch.Generator().manual_seed(options.seed)
    check_at = {round(k * options.steps / options.checks) for k in range(options.checks + 1)}
    best: dict[str, torch.Tensor] = {}
    first = least = float("inf")
    left: list[int] = []
    for step in range(options.steps + 1):
        student.write()
        if step in check_at:
            loss = divergence(base, model, held, options.micro)
            first = loss if step == 0 else first
            if not best or loss < least:
                least, best = loss, student.snapshot()
        if step < options.steps:
            if len(left) < options.sequences:
                left += torch.randperm(len(train_ids), generator=order).tolist()
            chosen, left = left[: options.sequences], left[options.sequences :]
            descend(base, model, train_ids[chosen], options.micro)
            student.step(1 - step / options.steps)
    return best | totals | {REPORT: torch.tensor([first, least])}


def split(calibration: CalibrationSet, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences to learn from, and the last ones, to judge by. Raises UsageError for fewer than two."""
    count = len(calibration.token_ids)
    if count < 2:
        raise UsageError(
            f"The pass 'kl-round' needs at least two calibration sequences, one to learn from and one to "
            f"judge by; {calibration.source} gives {count}. Raise --samples, or lower --sequence-tokens."
        )
    held = min(count - 1, max(1, round(count * options.holdout)))
    return calibration.token_ids[:-held], calibration.token_ids[-held:]


def start(skeleton: Skeleton, model: WholeModel, train: CalibrationSet, options: Options) -> Student:
    """The quantized model before its first step, rounding its inputs from now on."""
    for name in model.schemes:
        check_finite(f"{name}.weight", model.linears[name].weight.detach())
    if options.start == "rtn":
        roundings = start_nearest(model, train, options)
    else:
        roundings = start_layer_by_layer(skeleton, model, train, options)
    model.round_inputs()
    for rounding in roundings.values():
        rounding.linear.weight.requires_grad_(True)
    norms = norms_of(skeleton, model) if options.norms else {}
    return Student(model, roundings, norms, optimizer_for(roundings, norms, options))


def start_nearest(model: WholeModel, train: CalibrationSet, options: Options) -> dict[str, LearnedRounding]:
    """Roundings to the nearest values, under scales by the scheme's rule or searched ones."""
    importance = MeanSquares({name: model.linears[name] for name in model.schemes})
    model.round_inputs()
    if options.scales == "search":
        model.observe(importance.see, train.token_ids[:SEARCH_SEQUENCES].split(options.micro))
    roundings = {}
    for name, scheme in model.schemes.items():
        linear, form = model.linears[name], get_format(scheme.weight)
        weight = linear.weight.detach()
        if options.scales == "search":
            scales = search_scales(weight, form, importance[name])
        else:
            scales = form.scales(weight, scheme.scale_rule)
        roundings[name] = LearnedRounding(linear, scheme, scales, options.reach or 0.5)
    return roundings


def start_layer_by_layer(
    skeleton: Skeleton, model: WholeModel, train: CalibrationSet, options: Options
) -> dict[str, LearnedRounding]:
    """Roundings at what GPTQ, or AutoRound from there, makes of each layer."""
    chosen = "gptq" if options.start == "gptq" else {"autoround": {"start": "gptq", "seed": options.seed}}
    turned = any(scheme.input_transform for scheme in model.schemes.values())
    passes = [*(["block-rotation"] if turned else []), chosen]
    recipe = Recipe.model_validate({"name": PASS.name, "passes": passes})
    roundings = {}
    with TemporaryDirectory() as folder:
        made = LayerLoop(skeleton.model, recipe, train, LayerStore(Path(folder)), skeleton.device).run()
        for name, scheme in model.schemes.items():
            blocks = made[f"{name}.weight"]()
            assert isinstance(blocks, BlockTensor)
            scales, values = blocks.scales.to(model.device), blocks.dequantize().to(model.device)
            roundings[name] = LearnedRounding(model.linears[name], scheme, scales, options.reach or 4.0)
            roundings[name].start_at(values)
    return roundings


def norms_of(skeleton: Skeleton, model: WholeModel) -> dict[str, torch.Tensor]:
    """The weights of the decoder layers' norms, by ``<layer>:<parameter>.norm``."""
    return {
        f"{skeleton.prefix(index)}:{name}{NORM}": parameter.requires_grad_(True)
        for index, layer in enumerate(model.layers)
        for name, parameter in layer.named_parameters()
        if parameter.ndim == 1 and "norm" in name
    }


def optimizer_for(
    roundings: dict[str, LearnedRounding], norms: dict[str, torch.Tensor], options: Options
) -> torch.optim.Optimizer:
    """Adam over offsets, scales and norms, each with its own step size."""
    lr = options.lr or (2.0 if options.start == "rtn" else 0.1) / options.steps
    scale_lr = lr if options.scale_lr is None else options.scale_lr
    groups = [
        {"params": [r.offset for r in roundings.values()], "lr": lr, "weight_decay": options.decay},
        {"params": [r.log2_scale for r in roundings.values()], "lr": scale_lr},
    ]
    if norms:
        groups.append({"params": list(norms.values()), "lr": options.norm_lr})
    groups = [{**group, "first_lr": group["lr"]} for group in groups]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.0)


def descend(base: WholeModel, model: WholeModel, token_ids: torch.Tensor, micro: int) -> None:
    """Leave the gradient of the mean divergence over ``token_ids`` in the weights."""
    for part in token_ids.split(micro):
        (kl(base, model, part) * (len(part) / len(token_ids))).backward()


@torch.no_grad()
def divergence(base: WholeModel, model: WholeModel, token_ids: torch.Tensor, micro: int) -> float:
    """The mean divergence over ``token_ids`` [n, T], in nats a token."""
    sums = [kl(base, model, part) * len(part) for part in token_ids.split(micro)]
    return (torch.stack(sums).sum() / len(token_ids)).item()


def kl(base: WholeModel, model: WholeModel, token_ids: torch.Tensor) -> torch.Tensor:
    """KL(original || quantized) of the next token, the mean over all positions."""
    with torch.no_grad():
        wanted = F.log_softmax(base(token_ids), -1)
    found = F.log_softmax(model(token_ids), -1)
    return F.kl_div(found, wanted, log_target=True, reduction="sum") / token_ids.numel()


def round_layer(work: LayerWork, options: Options) -> None:
    """Finish the layer with what was learned. Raises FourfoldError when its weights are other ones."""
    for name, scheme in work.schemes.items():
        parts = {suffix: work.learned.get(name + suffix) for suffix in (BLOCKS, SCALES, WHOLE, TOTAL)}
        blocks, scales, seen = parts[BLOCKS], parts[SCALES], parts[TOTAL]
        assert blocks is not None and scales is not None and seen is not None, "learn covers every scheme"
        if not torch.allclose(total(work.linears[name].weight).cpu(), seen, rtol=1e-3):
            raise FourfoldError(
                f"{name}.weight is not the weight whose rounding 'kl-round' learned: another pass changed "
                "it. Remove that pass from the recipe."
            )
        whole = parts[WHOLE]
        tensor = BlockTensor(
            scheme.weight,
            blocks.to(work.device),
            scales.to(work.device),
            scheme.scale_rule,
            None if whole is None else whole.to(work.device),
        )
        work.finish(name, tensor)
    for name, parameter in work.module.named_parameters():
        learned = work.learned.get(f"{work.prefix}:{name}{NORM}")
        if learned is not None:
            parameter.data.copy_(learned)
    if work.index == 0:
        first, least = work.learned[REPORT].tolist()
        work.notes.append(
            f"kl-round brought the divergence on held-out sequences from {first:.4g} to {least:.4g}"
        )


def total(weight: torch.Tensor) -> torch.Tensor:
    """Sums by which a weight is known again: of its magnitudes, and of the left half's."""
    magnitudes = weight.detach().double().abs()
    return torch.stack([magnitudes.sum(), magnitudes[:, : magnitudes.shape[1] // 2].sum()]).cpu()


PASS = Pass(
    "kl-round", "round", learn=learn, layer=round_layer, options=Options, only_after=("block-rotation",)
)
