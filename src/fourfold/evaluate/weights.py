"""How far rounding has moved each quantized weight from the base's, read from two checkpoints.

A weight whose input is turned (``input_transform``) is turned back first, W = W' R^T. What passes have folded
into weights (scales moved between a norm and its linears) cannot be told from rounding here; norms that
differ from the base's give it away, and the picture then says so.
"""

import re
from collections.abc import Callable
from math import log10

import torch

from fourfold.checkpoint import Checkpoint
from fourfold.core.records import LinearError
from fourfold.formats import BlockTensor, hadamard, turn

NORM_MOVED = 0.01
NOT_ROUNDING = 0.5


def linear_errors(
    model: Checkpoint, base: Checkpoint, progress: Callable[[int, int], None]
) -> tuple[list[LinearError], list[str]]:
    """The error of every quantized weight in checkpoint order, and notes on what a reader must know."""
    known = set(base.names())
    packed = [name for name in model.names() if model.info(name).format is not None]
    shared = [n for n in packed if n in known and base.info(n).shape == model.info(n).shape]
    found = []
    for place, name in enumerate(shared):
        found.append(linear_error(model, base, name))
        progress(place + 1, len(shared))
    return found, notes(model, base, found, len(packed) - len(shared))


def linear_error(model: Checkpoint, base: Checkpoint, name: str) -> LinearError:
    """The error of one weight."""
    held, original = model.load(name), plain(base.load(name))
    distance = float((unturned(model, name, plain(held)) - original).norm())
    error = distance / max(float(original.norm()), torch.finfo(torch.float32).tiny)
    place = re.search(r"\.layers\.(\d+)\.", name)
    return LinearError(
        name=name.removesuffix(".weight"),
        layer=int(place.group(1)) if place else None,
        format=str(model.info(name).format),
        relative_error=error,
        sqnr_db=-20 * log10(error) if error > 0 else None,
    )


def plain(value: torch.Tensor | BlockTensor) -> torch.Tensor:
    """A tensor as float32, whatever holds it."""
    return value.dequantize(torch.float32) if isinstance(value, BlockTensor) else value.float()


def unturned(model: Checkpoint, name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight as it would multiply inputs that are not turned."""
    module = name.removesuffix(".weight")
    scheme = model.quantization.layer(module)
    if scheme is None or scheme.input_transform is None:
        return weight
    trained = scheme.input_transform == "trained"
    rotation = plain(model.load(f"{module}.input_rotation")) if trained else hadamard()
    return turn(weight, rotation.T)


def notes(model: Checkpoint, base: Checkpoint, found: list[LinearError], missing: int) -> list[str]:
    """What makes these errors more than rounding, if anything does."""
    said = []
    if missing:
        said.append(f"{missing} quantized weights are not in the base under that name and shape.")
    moved = sum(norm_moved(model, base, name) for name in model.names() if name.endswith("norm.weight"))
    if moved:
        said.append(
            f"{moved} norms differ from the base's: scales were folded into the weights, whose errors "
            "hold that too. Look at the layers' errors."
        )
    far = sum(e.relative_error > NOT_ROUNDING for e in found)
    if far:
        said.append(
            f"{far} weights are more than half their size away from the base's, which is no rounding: a "
            "pass rescaled or turned them, or the base is another model."
        )
    return said


def norm_moved(model: Checkpoint, base: Checkpoint, name: str) -> bool:
    """Whether a norm's weight is another than the base's."""
    if name not in base.names() or base.info(name).shape != model.info(name).shape:
        return False
    original = plain(base.load(name))
    return float((plain(model.load(name)) - original).norm()) > NORM_MOVED * float(original.norm())
