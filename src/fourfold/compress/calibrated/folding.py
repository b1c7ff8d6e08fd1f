"""Folding scales into the operation before a group of linear layers, so that they cost nothing at run time.

Scales are not held to powers of two: on a 28M model that gave away a third and more of what smoothing wins
with MXFP4. So each stored value is taken as it will be held. A norm's weight is rounded to its type in the
file, and its readers get the factor that this really divides by; a norm may multiply by w or by 1 + w, which
is found by running it. Where a bias or a weight that is not rounded to blocks would be divided as well, one
factor cannot serve both, and scales are powers of two, which every float type holds. A reader that is kept (a
router) is multiplied in float32 and rounded once to its type.

After folding the layer is run again. A group whose output changed has a reader that nobody saw: it is undone
and noted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fourfold.compress.calibrated.groups import Group, Trace, exact_forward, scale_reader, scale_source
from fourfold.compress.calibrated.work import LayerWork

CHANGED = 1e-3  # of the length of what the layer adds to a token
CHANGED_TOKENS = 0.02  # a router's near tie may fall the other way


def power_of_two(scales: torch.Tensor) -> torch.Tensor:
    """The nearest powers of two, by ratio, of positive ``scales``."""
    return scales.log2().round().exp2()


@dataclass(frozen=True, eq=False)
class Fold:
    """A group with the scales [channels] that its source's output is divided by."""

    group: Group
    scales: torch.Tensor


@torch.no_grad()
def fold_all(work: LayerWork, trace: Trace, folds: Iterable[Fold]) -> None:
    """Fold every one of ``folds`` that leaves the layer's function as it is; note the others."""
    done = [made for fold in folds if (made := _fold(work, fold)) is not None]
    if not done or preserved(work, trace):
        return
    for fold in done:
        _apply(work, fold, undo=True)
    for fold in done:
        _apply(work, fold)
        if not preserved(work, trace):
            _apply(work, fold, undo=True)
            _note(work, fold, "something else reads its output, so that folding would change the layer")


@torch.no_grad()
def preserved(work: LayerWork, trace: Trace) -> bool:
    """Whether the layer still computes what it did when ``trace`` was made."""
    before, after = trace.output, exact_forward(work, trace.hidden)
    added = (before - trace.hidden.to(before)).norm(dim=-1)
    changed = (after - before).norm(dim=-1) > CHANGED * added
    return bool(after.isfinite().all()) and changed.float().mean().item() <= CHANGED_TOKENS


def _fold(work: LayerWork, fold: Fold) -> Fold | None:
    """Apply ``fold``; returns it with the scales that were really taken, None when there is no way."""
    source = work.module.get_submodule(fold.group.source)
    offset = None
    if not isinstance(source, nn.Linear) and (offset := norm_offset(source)) is None:
        _note(work, fold, f"{type(source).__name__} does not multiply by its weight in a known way")
        return None
    scales = fold.scales
    if source._parameters.get("bias") is not None or _is_kept_linear(work, source):
        scales = power_of_two(scales)
    if offset is not None:
        scales = _storable(source.get_parameter("weight"), scales, offset, _dtype(work, fold))
    taken = Fold(fold.group, scales)
    _apply(work, taken)
    return taken


def _is_kept_linear(work: LayerWork, source: nn.Module) -> bool:
    return isinstance(source, nn.Linear) and all(work.linears[name] is not source for name in work.schemes)


def _dtype(work: LayerWork, fold: Fold) -> torch.dtype:
    """What the weight of the group's norm is stored as."""
    return work.dtypes.get(f"{fold.group.source}.weight", torch.float32)


def _apply(work: LayerWork, fold: Fold, undo: bool = False) -> None:
    scales = 1 / fold.scales if undo else fold.scales
    source = work.module.get_submodule(fold.group.source)
    if isinstance(source, nn.Linear):
        scale_source(source, scales)
    else:
        offset = norm_offset(source)
        assert offset is not None
        weight = source.get_parameter("weight")
        weight.copy_(((weight + offset) / scales - offset).to(_dtype(work, fold)))
        bias = source._parameters.get("bias")
        if bias is not None:
            bias.div_(scales)
    spread = fold.group.spread.to(scales.device)
    for reader in fold.group.readers:
        scale_reader(work.module.get_submodule(reader), scales[spread])


def _storable(weight: torch.Tensor, scales: torch.Tensor, offset: float, dtype: torch.dtype) -> torch.Tensor:
    """What the norm's factor is really divided by when its new weight is held in ``dtype``; 1 where the
    factor is or would be zero.
    """
    factor = weight + offset
    held = (factor / scales - offset).to(dtype).float() + offset
    usable = (factor != 0) & (held != 0)
    return torch.where(usable, factor / torch.where(usable, held, 1), 1)


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float | None:
    """c where ``norm`` multiplies by c + weight: 0 or 1, found by running it; None for anything else."""
    weight = norm.get_parameter("weight")
    bias = norm._parameters.get("bias")
    kept = [(p, p.clone()) for p in (weight, bias) if p is not None]
    x = torch.linspace(-1, 2, weight.numel(), device=weight.device)[None]
    try:
        if bias is not None:
            bias.zero_()
        for offset in (0.0, 1.0):
            weight.fill_(-offset)
            if not _run(norm, x).any():
                return offset
        return None
    finally:
        for parameter, value in kept:
            parameter.copy_(value)


def _run(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    try:
        return norm(x)
    except TypeError:  # a gated norm takes the gate as well
        return norm(x, x)


def _note(work: LayerWork, fold: Fold, why: str) -> None:
    work.notes.append(f"{work.prefix}: not smoothed behind {fold.group.source}: {why}.")
