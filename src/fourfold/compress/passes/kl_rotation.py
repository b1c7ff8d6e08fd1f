"""Trained block rotation and smoothing: matrices and scales that bring the logits back to the original's.

Each distinct input gets its own orthogonal [32, 32] matrix, applied while the model runs as in
``block-rotation``, and each channel a scale that is folded into the operation before it, at no cost. Both
are learned by Adam on the Kullback-Leibler divergence of the rounded model's next-token distribution from
the original's, weights and activations rounded to nearest in the loop. The method is that of AMD's "Advanced
MXFP4 Quantization: Combining Fine-Tuned Rotations with SmoothQuant for Near-Lossless Compression" (ROCm blog,
Quark), which reports more than 98 % of BF16's accuracy for MXFP4 weights and activations on Qwen3-8B and
-14B; trained rotations are SpinQuant's (Liu et al., arXiv:2405.16406), scales and rotations on a divergence
OSTQuant's (Hu et al., arXiv:2501.13987). Different here: matrices are Hadamard times a matrix exponential,
which plain Adam can train, and the divergence is over all words, not the likeliest thousand. What is scaled
is what :mod:`fourfold.compress.calibrated.groups` finds and all of whose members are rounded: behind a norm
that a router or another kept layer reads too, nothing is.

The last ``holdout`` share of the sequences is never learned from, and of the start and ``checks`` later
points the one with the smallest divergence there is kept.

The price: the whole model in float32, one layer's training, and the logits of ``micro`` sequences in memory:
4 bytes a parameter, 24 a parameter of one layer, and 20 a token and word of the vocabulary. Layers are
computed twice in each step to keep no more than their inputs. Readers must hold the matrices, 4 KB for each
linear layer, and multiply by them.
"""

from functools import partial

import torch
from pydantic import Field

from fourfold.checkpoint.rotations import INPUT_ROTATION
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.compress.calibrated.groups import find_groups
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.trained_transform import (
    SCALES,
    TrainedTransform,
    available_bytes,
    check_memory,
    fold,
)
from fourfold.compress.calibrated.whole import divergence_of
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.model import Entry, Model
from fourfold.compress.pipeline import Change, Pass, Tell, silent
from fourfold.compress.rotated import note_online, rotated_model, turn_weight
from fourfold.core.errors import FourfoldError
from fourfold.core.records import Record
from fourfold.formats import ROTATION_SIZE

REPORT = "report"


class Options(Record):
    """``modules``: globs of the linear layers to rotate. ``rotation_lr`` (radians) and ``smoothing_lr`` (of
    the scales' logarithm) are Adam's first steps; they decay linearly to zero. A step sees ``sequences``
    sequences, ``micro`` at a time.
    """

    modules: list[str] = Field(["*"], min_length=1)
    steps: int = Field(200, ge=1)
    sequences: int = Field(8, ge=1)
    micro: int = Field(2, ge=1)
    rotation_lr: float = Field(5e-3, gt=0)
    smoothing: bool = True
    smoothing_lr: float = Field(1e-2, gt=0)
    holdout: float = Field(0.1, ge=0, lt=1)
    checks: int = Field(5, ge=1)
    seed: int = 0


def prepare(model: Model, options: Options) -> Model:
    """``model`` whose scheme says what is rotated, with a matrix for each of these modules."""
    model = rotated_model(model, options.modules, "trained", PASS.name)
    entries: dict[str, Entry] = {}
    for module, scheme in model.quantization.layers.items():
        if scheme.input_transform == "trained":
            name, shape = module + INPUT_ROTATION, (ROTATION_SIZE, ROTATION_SIZE)
            info = TensorInfo(name, shape, torch.float32, None, 4 * ROTATION_SIZE**2)
            entries[name] = Entry(info, partial(_untrained, name), info)
    return model.with_entries(entries)


def _untrained(name: str) -> torch.Tensor:
    raise FourfoldError(f"{name} has not been trained yet. Run the recipe again with --resume.")


def learn(
    skeleton: Skeleton, calibration: CalibrationSet, options: Options, change: Change, tell: Tell = silent
) -> dict[str, torch.Tensor]:
    """Per rotated module its ``.input_rotation``, per layer and source of a group its ``.smoothing``.

    Raises FourfoldError when the memory is not there, or the divergence is no number.
    """
    train, held = split(calibration.token_ids, options.holdout)
    check_memory(skeleton, options.micro * train.shape[1], available_bytes(skeleton.device))
    try:
        transform = TrainedTransform(skeleton, train, smoothing=options.smoothing)
        return _train(transform, train, held, options, tell)
    except torch.OutOfMemoryError as error:
        raise FourfoldError(
            f"The GPU ran out of memory while rotations were trained on {options.micro} sequences of "
            f"{train.shape[1]} tokens at a time ({str(error).splitlines()[0]}). Lower `micro` or "
            "--sequence-tokens, and run again."
        ) from error


def split(token_ids: torch.Tensor, holdout: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences [n, T] to learn from, and the last ones, to judge by; all for both where there is one."""
    held = min(len(token_ids) - 1, max(1, round(len(token_ids) * holdout))) if holdout else 0
    return (token_ids[:-held], token_ids[-held:]) if held else (token_ids, token_ids)


def _train(
    transform: TrainedTransform, train: torch.Tensor, held: torch.Tensor, options: Options, tell: Tell
) -> dict[str, torch.Tensor]:
    optimizer = _optimizer(transform, options)
    generator = torch.Generator().manual_seed(options.seed)
    check_at = {round(k * options.steps / options.checks) for k in range(options.checks + 1)}
    best, losses, left = {}, [], []
    for step in range(options.steps + 1):
        if tell("training for kl-rotation", step, options.steps):
            break
        if step in check_at:
            losses.append(divergence(transform, held, options.micro))
            if losses[-1] == min(losses):
                best = transform.learned()
        if step == options.steps:
            break
        while len(left) < options.sequences:
            left += torch.randperm(len(train), generator=generator).tolist()
        chosen, left = left[: options.sequences], left[options.sequences :]
        for part in train[chosen].split(options.micro):
            (kl(transform, part) * (len(part) / len(chosen))).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["first_lr"] * (1 - step / options.steps)
        optimizer.step()
        optimizer.zero_grad()
    return best | {REPORT: torch.tensor([losses[0], min(losses)])}


def _optimizer(transform: TrainedTransform, options: Options) -> torch.optim.Optimizer:
    groups = [{"params": [transform.angles], "first_lr": options.rotation_lr}]
    if transform.log_scales:
        scales = list(transform.log_scales.values())
        groups.append({"params": scales, "first_lr": options.smoothing_lr})
    # gradients of single angles are far below Adam's usual floor
    return torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-20)


def kl(transform: TrainedTransform, token_ids: torch.Tensor) -> torch.Tensor:
    """KL(original || rounded) of the next token, the mean over all positions of token ids [B, T]."""
    with torch.no_grad():
        wanted = transform.logits(token_ids, served=False)
    return divergence_of(wanted, transform.logits(token_ids, served=True))


@torch.no_grad()
def divergence(transform: TrainedTransform, token_ids: torch.Tensor, micro: int) -> float:
    """The mean divergence over ``token_ids`` [n, T], in nats a token. Raises FourfoldError for NaN or Inf."""
    sums = [kl(transform, part) * len(part) for part in token_ids.split(micro)]
    loss = (torch.stack(sums).sum() / len(token_ids)).item()
    if not loss < float("inf"):
        raise FourfoldError(
            f"The rounded model's divergence from the original is {loss} while rotations are trained: the "
            "model computes no numbers, or the steps are too large. Lower `rotation_lr` and `smoothing_lr`; "
            "if it stays so, `fourfold evaluate` the original."
        )
    return loss


def transform_layer(work: LayerWork, options: Options) -> None:
    """Fold the scales into the layer, turn its weights, and let it turn its inputs from now on."""
    note_online(work)
    if work.index == 0:
        first, least = work.learned[REPORT].tolist()
        work.notes.append(
            f"kl-rotation brought the divergence on held-out sequences from {first:.4g} to {least:.4g}."
        )
    if any(key.startswith(f"{work.prefix}:") for key in work.learned):
        for group in find_groups(work).groups:
            scales = work.learned.get(f"{work.prefix}:{group.source}{SCALES}")
            if scales is not None:
                fold(work, group, scales.to(work.device))
    for name, scheme in work.schemes.items():
        if scheme.input_transform == "trained":
            turn_weight(work.linears[name], work.learned[name + INPUT_ROTATION].to(work.device))


PASS = Pass(
    "kl-rotation",
    "rotate",
    prepare=prepare,
    learn=learn,
    layer=transform_layer,
    options=Options,
    only_after=(),
)
