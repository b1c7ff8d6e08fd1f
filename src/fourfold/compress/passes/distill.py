"""Train the weights through their rounding, all layers together, on the original model's logits.

Quantization-aware distillation (LLM-QAT, Liu et al., arXiv:2305.17888): Adam on float32 latents of all
weights minimises the Kullback-Leibler divergence of the quantized model's next-token distribution from the
original's, with gradients straight through every rounding; what is stored is the latents, rounded. Layers
can make up for each other, which no method that goes layer by layer lets them, and activation formats are
simulated. ``norms`` also trains the norm weights of the decoder layers, which are kept in their own dtype.

Few tokens tell little about many weights, so the model writes ``own`` more sequences by itself, as many as
training wants: they cost time and no data, and cannot be overfitted for long. Each goes on from some words of
the calibration text, to be about the same things. The last ``holdout`` share of the calibration set is never
trained on; of the start and ``checks`` later points the one with the smallest divergence there is kept. Only
rotations may come before it.

The price: original and quantized model in memory with everything that training needs, about 30 bytes a
parameter and the activations of ``micro`` sequences, and a few GPU minutes for 100 million parameters. For
what does not fit there are ``gptq`` and ``autoround``.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from pydantic import Field

from fourfold.compress.calibrated.author import continue_together
from fourfold.compress.calibrated.latent import Latents
from fourfold.compress.calibrated.replay import Replayed
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.whole import WholeModel, divergence_of
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.passes.rtn import check_finite
from fourfold.compress.pipeline import Change, Pass, Tell, silent
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.records import Record
from fourfold.formats import BlockTensor

WARM_UP_STEPS = 20
REFRESH_STEPS = 250  # after so many, feedback of inputs is that of the weights as they are then
BLOCKS, SCALES, WHOLE, TOTAL, NORM, REPORT = (
    ".blocks",
    ".scales",
    ".global_scale",
    ".total",
    ".norm",
    "report",
)


class Options(Record):
    """``lr`` and ``norm_lr`` are Adam's largest steps, reached after a short warm-up and then lowered to zero
    along a cosine. A step sees ``sequences`` sequences, ``micro`` at a time. ``own`` sequences, as long as
    those of the calibration set, are written by the model from its words on and trained on with them.
    """

    steps: int = Field(300, ge=1)
    sequences: int = Field(32, ge=1)
    micro: int = Field(8, ge=1)
    own: int = Field(0, ge=0)
    lr: float = Field(3e-5, gt=0)
    norms: bool = True
    norm_lr: float = Field(1e-4, gt=0)
    holdout: float = Field(0.1, gt=0, lt=1)
    checks: int = Field(5, ge=1)
    seed: int = 0


@dataclass
class Student:
    """The quantized model while it is trained, and its optimiser."""

    model: WholeModel
    latents: Latents
    norms: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer

    def step(self, share: float) -> None:
        """One step of ``share`` of the largest size; the gradients are zero again."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["largest"] * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def refresh(self) -> None:
        """Inputs are rounded for the weights of this moment, where they are rounded with feedback."""
        for linear in self.model.linears.values():
            linear.refresh_feedback()

    def snapshot(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Copies of what is trained."""
        norms = {name: norm.detach().clone() for name, norm in self.norms.items()}
        return self.latents.values.detach().clone(), norms

    def learned(self, snapshot: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A snapshot as ``learn`` returns it."""
        self.latents.values.copy_(snapshot[0])
        kept = dict(snapshot[1])
        for name in self.latents.windows:
            blocks = self.latents.blocks(name)
            kept |= {name + BLOCKS: blocks.blocks, name + SCALES: blocks.scales}
            if blocks.global_scale is not None:
                kept[name + WHOLE] = blocks.global_scale
        return kept


def learn(
    skeleton: Skeleton, calibration: CalibrationSet, options: Options, change: Change, tell: Tell = silent
) -> dict[str, torch.Tensor]:
    """Per weight its final ``.blocks``, ``.scales`` and a ``.total`` that tells which weight they are for.

    Raises UsageError for fewer than two sequences, FourfoldError for NaN or Inf in a weight and when the
    GPU's memory is not enough.
    """
    try:
        return _learn(skeleton, calibration, options, change, tell)
    except torch.OutOfMemoryError as error:
        raise FourfoldError(
            f"The GPU ran out of memory while 'distill' trained on {options.micro} sequences of "
            f"{calibration.token_ids.shape[1]} tokens at a time ({str(error).splitlines()[0]}). Lower "
            "`micro` or --sequence-tokens; if it is the model that does not fit, use `autoround`."
        ) from error


def _learn(
    skeleton: Skeleton, calibration: CalibrationSet, options: Options, change: Change, tell: Tell
) -> dict[str, torch.Tensor]:
    train_ids, held = split(calibration, options)
    base, model = WholeModel(skeleton), WholeModel(skeleton)
    if options.own:
        enough = partial(tell, "writing text for distill")
        own = continue_together(base, train_ids, options.own, options.seed, enough=enough)
        train_ids = torch.cat([train_ids, own])
    change(model)
    totals = {name + TOTAL: total(model.linears[name].weight) for name in model.schemes}
    student = start(skeleton, model, options)
    batches = Batches(train_ids, options.sequences, options.seed)
    check_at = {round(k * options.steps / options.checks) for k in range(options.checks + 1)}
    descend = descent(base, model, batches.size)
    best = student.snapshot()
    first = least = float("inf")
    for step in range(options.steps + 1):
        if tell("training for distill", step, options.steps):
            break
        student.latents.write()
        if step % REFRESH_STEPS == 0 or step in check_at:
            student.refresh()
        if step in check_at:
            loss = divergence(base, model, held, options.micro)
            first = loss if step == 0 else first
            if not math.isfinite(first):
                raise FourfoldError(
                    f"The rounded model's divergence from the original is {first} before 'distill' takes a "
                    "step: one of the two computes no finite numbers. `fourfold evaluate` the original."
                )
            if loss < least:
                least, best = loss, student.snapshot()
        if step < options.steps:
            for part in batches.next().split(options.micro):
                descend(part)
            student.step(share_of(step, options.steps))
    return student.learned(best) | totals | {REPORT: torch.tensor([first, least])}


class Batches:
    """``size`` of the sequences ``token_ids`` [n, T] at a time (or all), each once in random order before any
    twice.
    """

    def __init__(self, token_ids: torch.Tensor, size: int, seed: int):
        self.token_ids, self.size = token_ids, min(size, len(token_ids))
        self.order = torch.Generator().manual_seed(seed)
        self.left: list[int] = []

    def next(self) -> torch.Tensor:
        """[``size``, T]."""
        if len(self.left) < self.size:
            self.left += torch.randperm(len(self.token_ids), generator=self.order).tolist()
        chosen, self.left = self.left[: self.size], self.left[self.size :]
        return self.token_ids[chosen]


def share_of(step: int, steps: int) -> float:
    """What part of the largest step size ``step`` of ``steps`` has: a warm-up, then a cosine down to zero."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * (1 + math.cos(math.pi * step / steps)) / 2


def split(calibration: CalibrationSet, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences to learn from, and the last ones, to judge by. Raises UsageError for fewer than two."""
    count = len(calibration.token_ids)
    if count < 2:
        raise UsageError(
            f"The pass 'distill' needs at least two calibration sequences, one to learn from and one to "
            f"judge by; {calibration.source} gives {count}. Raise --samples, or lower --sequence-tokens."
        )
    held = min(count - 1, max(1, round(count * options.holdout)))
    return calibration.token_ids[:-held], calibration.token_ids[-held:]


def start(skeleton: Skeleton, model: WholeModel, options: Options) -> Student:
    """The quantized model before its first step, rounding its inputs from now on."""
    for name in model.schemes:
        check_finite(f"{name}.weight", model.linears[name].weight.detach())
    latents = Latents(model.linears, model.schemes)
    model.round_inputs()
    norms = norms_of(skeleton, model) if options.norms else {}
    groups = [{"params": [latents.values], "lr": options.lr}]
    groups += [{"params": list(norms.values()), "lr": options.norm_lr}] if norms else []
    groups = [{**group, "largest": group["lr"]} for group in groups]
    on_gpu = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.0, fused=on_gpu)
    return Student(model, latents, norms, optimizer)


def norms_of(skeleton: Skeleton, model: WholeModel) -> dict[str, torch.Tensor]:
    """The weights of the decoder layers' norms, by ``<layer>:<parameter>.norm``."""
    return {
        f"{skeleton.prefix(index)}:{name}{NORM}": parameter.requires_grad_(True)
        for index, layer in enumerate(model.layers)
        for name, parameter in layer.named_parameters()
        if parameter.ndim == 1 and "norm" in name
    }


def descent(base: WholeModel, model: WholeModel, sequences: int) -> Replayed:
    """Adds to the weights' gradients a part's share of that of the mean divergence over ``sequences``."""

    def add(token_ids: torch.Tensor) -> None:
        (kl(base, model, token_ids) * (len(token_ids) / sequences)).backward()

    return Replayed(add, model.device)


@torch.no_grad()
def divergence(base: WholeModel, model: WholeModel, token_ids: torch.Tensor, micro: int) -> float:
    """The mean divergence over ``token_ids`` [n, T], in nats a token."""
    sums = [kl(base, model, part) * len(part) for part in token_ids.split(micro)]
    return (torch.stack(sums).sum() / len(token_ids)).item()


def kl(base: WholeModel, model: WholeModel, token_ids: torch.Tensor) -> torch.Tensor:
    """KL(original || quantized) of the next token, the mean over all positions."""
    with torch.no_grad():
        wanted = base(token_ids)
    return divergence_of(wanted, model(token_ids))


def round_layer(work: LayerWork, options: Options) -> None:
    """Finish the layer with what was learned. Raises FourfoldError when its weights are other ones."""
    for name, scheme in work.schemes.items():
        parts = {suffix: work.learned.get(name + suffix) for suffix in (BLOCKS, SCALES, WHOLE, TOTAL)}
        blocks, scales, seen = parts[BLOCKS], parts[SCALES], parts[TOTAL]
        assert blocks is not None and scales is not None and seen is not None, "learn covers every scheme"
        if not torch.allclose(total(work.linears[name].weight).cpu(), seen, rtol=1e-3):
            raise FourfoldError(
                f"{name}.weight is not the weight that 'distill' trained: another pass changed it. Remove "
                "that pass from the recipe."
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
            f"distill brought the divergence on held-out sequences from {first:.4g} to {least:.4g}"
        )


def total(weight: torch.Tensor) -> torch.Tensor:
    """Sums by which a weight is known again: of its magnitudes, and of the left half's."""
    magnitudes = weight.detach().double().abs()
    return torch.stack([magnitudes.sum(), magnitudes[:, : magnitudes.shape[1] // 2].sum()]).cpu()


PASS = Pass(
    "distill",
    "round",
    learn=learn,
    layer=round_layer,
    options=Options,
    only_after=("block-rotation", "kl-rotation", "input-feedback"),
)
