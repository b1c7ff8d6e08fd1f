"""What passes on inputs share: which linear layers are rotated or fed back, and the turn itself."""

import re
from collections.abc import Callable

import torch

from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.work import LayerWork
from fourfold.compress.model import Model
from fourfold.compress.recipe import first_match
from fourfold.core.errors import UsageError
from fourfold.core.quantization import InputTransform, LayerScheme
from fourfold.formats import ROTATION_SIZE, turn

IN_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")


def rotated_model(model: Model, modules: list[str], transform: InputTransform, who: str) -> Model:
    """``model`` whose scheme asks for ``transform`` of the inputs of all rounded linear layers that match.

    Left alone is a layer whose inputs are no multiple of 32, and what lies outside the decoder layers. Raises
    UsageError when nothing is rotated.
    """
    rotated = with_inputs(model, modules, {"input_transform": transform})
    if rotated is None:
        raise UsageError(
            f"The pass '{who}' rotates nothing: of the linear layers that the recipe rounds, none that has a "
            f"multiple of {ROTATION_SIZE} inputs matches `modules` ({', '.join(modules)}). Remove the pass, "
            "or change its globs."
        )
    return rotated


def with_inputs(
    model: Model,
    modules: list[str],
    update: dict[str, object],
    may: Callable[[str, LayerScheme], bool] = lambda name, scheme: True,
) -> Model | None:
    """``model`` with ``update`` in the schemes of all rounded linear layers of decoder layers that match
    ``modules``, have a multiple of 32 inputs, and ``may`` have it; None when that changes nothing.
    """
    layers = {
        name: scheme.model_copy(update=update)
        if may(name, scheme) and first_match(modules, name) and can_turn(model, name)
        else scheme
        for name, scheme in model.quantization.layers.items()
    }
    if layers == model.quantization.layers:
        return None
    quantization = model.quantization.model_copy(update={"layers": layers})
    return Model(model.config, model.entries, quantization)


def can_turn(model: Model, module: str) -> bool:
    """Whether ``module`` is part of a decoder layer and its inputs come in whole blocks of 32."""
    inputs = model.entries[f"{module}.weight"].info.shape[-1]
    return IN_LAYER.search(module) is not None and inputs % ROTATION_SIZE == 0


@torch.no_grad()
def turn_weight(linear: CalibratedLinear, rotation: torch.Tensor) -> None:
    """Turn the weight of ``linear`` by the orthogonal ``rotation`` [32, 32], and its inputs from now on."""
    linear.weight.copy_(turn(linear.weight, rotation))
    linear.rotation = rotation


def note_online(work: LayerWork) -> None:
    """Tell readers, once a model, what they must do."""
    if work.index == 0:
        work.notes.append(
            f"Inputs of linear layers are rotated in runs of {ROTATION_SIZE} while the model runs. Readers "
            "that do not apply transform_config (compressed-tensors) or online rotations (Quark) answer "
            "nonsense."
        )
