"""Inputs that are turned while a model runs: what dialects agree on.

A trained matrix is a tensor of the model, ``<module>.input_rotation``, float32 [32, 32]; the Hadamard matrix
is not, whatever a dialect stores of it. Layers that serving engines compute as one (q, k and v; gate and up)
have one input, and these engines turn it once: they must be turned alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from fourfold.checkpoint.dialect import VALUE, Entry, kept_linears
from fourfold.checkpoint.storage.header import StoredTensor, broken, short
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import InputTransform, LayerScheme, Quantization
from fourfold.formats import ROTATION_SIZE, hadamard_signs

INPUT_ROTATION = ".input_rotation"
SHAPE = (ROTATION_SIZE, ROTATION_SIZE)
# the last part of a module's name -> what engines compute it as a part of
FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w1", "w3"), "w13"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "qkv_a_proj"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), "in_proj"),
}


@dataclass(frozen=True)
class Rotations:
    """What a configuration says: how a module's input is turned, and which stored tensors are matrices.

    ``owner`` gives the key of a stored matrix, or None for any other tensor; ``pick`` finds the matrix of a
    module among those by key.
    """

    transform: Callable[[str], InputTransform | None]
    owner: Callable[[str], str | None]
    pick: Callable[[str, Mapping[str, StoredTensor]], StoredTensor | None]


def fused_name(module: str) -> str:
    """The module that engines compute ``module`` in: ``….self_attn.qkv_proj`` for a q_proj."""
    parent, dot, leaf = module.rpartition(".")
    return parent + dot + FUSED.get(leaf, leaf)


def without_rotations(quantization: Quantization) -> Quantization:
    """``quantization`` for the tables that speak of formats only."""
    left_out = {"input_transform": None, "input_feedback": None}
    plain = {m: s.model_copy(update=left_out) for m, s in quantization.layers.items()}
    return quantization.model_copy(update={"layers": plain})


def rotated(quantization: Quantization, transform: InputTransform) -> list[str]:
    """The modules whose inputs are turned by ``transform``."""
    return [m for m, scheme in quantization.layers.items() if scheme.input_transform == transform]


def add_rotations(
    layers: dict[str, LayerScheme],
    entries: dict[str, Entry],
    rotations: Rotations,
    stored: Mapping[str, StoredTensor],
    load: Callable[[StoredTensor], torch.Tensor],
) -> None:
    """Put what the configuration says into ``layers``, and trained matrices into ``entries``.

    ``stored`` holds matrices by key. Raises FourfoldError for a matrix that is missing or no such matrix, and
    for a rotation of what is not quantized.
    """
    checked: set[str] = set()
    for module, scheme in layers.items():
        if (transform := rotations.transform(module)) is None:
            continue
        layers[module] = scheme.model_copy(update={"input_transform": transform})
        matrix = rotations.pick(module, stored)
        if transform == "trained":
            entries[module + INPUT_ROTATION] = _trained(module, matrix)
        elif matrix is not None and matrix.name not in checked:
            _check_hadamard(matrix, load)
            checked.add(matrix.name)
    for module in kept_linears(entry.info for entry in entries.values()):
        if rotations.transform(module) is not None:
            raise FourfoldError(
                f"quantization_config turns the inputs of '{short(module)}', which is not quantized; "
                "Fourfold turns those of quantized layers only. Start from the unquantized model."
            )


def check_shared(quantization: Quantization, load: Callable[[str], object]) -> None:
    """Raise UsageError when layers that engines compute as one are turned by different trained matrices."""
    groups: dict[str, list[str]] = {}
    for module in rotated(quantization, "trained"):
        groups.setdefault(fused_name(module), []).append(module)
    for modules in groups.values():
        for first, second in pairwise(modules):
            matrices = [load(module + INPUT_ROTATION) for module in (first, second)]
            if not torch.equal(*(m for m in matrices if isinstance(m, torch.Tensor))):
                raise UsageError(
                    f"{first} and {second} have one input but turn it by different matrices, which engines "
                    "that compute them as one cannot follow. Train one rotation for both."
                )


def _trained(module: str, matrix: StoredTensor | None) -> Entry:
    if matrix is None:
        raise FourfoldError(
            f"quantization_config says that the inputs of '{short(module)}' are turned by a trained matrix, "
            "which is not among the tensors. The folder is incomplete: fetch it again."
        )
    if matrix.shape != SHAPE or not matrix.dtype.is_floating_point:
        raise broken(
            matrix.path,
            f"the rotation '{short(matrix.name)}' is {matrix.dtype} {list(matrix.shape)}, not a float matrix "
            f"of {list(SHAPE)}",
        )
    name = module + INPUT_ROTATION
    return Entry(
        TensorInfo(name, SHAPE, torch.float32, None, matrix.nbytes, matrix.path.name), {VALUE: matrix}
    )


def _check_hadamard(matrix: StoredTensor, load: Callable[[StoredTensor], torch.Tensor]) -> None:
    if matrix.shape != SHAPE or not torch.equal(load(matrix).sign().to(torch.int8), hadamard_signs()):
        raise FourfoldError(
            f"'{short(matrix.name)}' in {matrix.path} is not Sylvester's Hadamard matrix of {ROTATION_SIZE}, "
            "the only one that Fourfold turns inputs by without training. Start from the unquantized model."
        )
