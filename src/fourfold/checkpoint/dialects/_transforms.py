"""transform_config: how compressed-tensors says that inputs are turned while the model runs.

A group has a type, a size and targets, and creates a submodule ``<group>_input`` of each target, whose
parameter ``weight`` [32, 32] is stored. Groups of the type ``hadamard`` make Sylvester's matrix themselves;
for ``random-hadamard`` readers load what is stored, whatever it is. Both compute ``x @ weight / sqrt(32)``
(compressed-tensors' HadamardTransform and vLLM's module of the same name), so a trained rotation is stored
times sqrt(32) under the second type. Transforms of weights are applied before a checkpoint is written, so
that none is listed here: a reader that applied them again would undo the rotation.

As the library does, the matrix of a group is held once in memory: a group of trained matrices holds layers
that have one. The Hadamard matrix is stored once, as the library stores it, so that a reader which knows
nothing of transforms meets a tensor that it does not know, instead of computing nonsense in silence.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from fourfold.checkpoint.block_dialect import damaged, objects, texts
from fourfold.checkpoint.dialects._targets import LINEAR, Targets
from fourfold.checkpoint.rotations import SHAPE, Rotations, fused_name, rotated
from fourfold.checkpoint.storage.header import PlannedTensor, StoredTensor, short
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import InputTransform, LayerScheme, Quantization
from fourfold.formats import ROTATION_SIZE, hadamard_signs

TYPES: dict[InputTransform, str] = {"hadamard": "hadamard", "trained": "random-hadamard"}
HADAMARD_GROUP = "block_rotation"
STORED_TIMES = ROTATION_SIZE**0.5
FUSED_INTO_WEIGHTS = ("weight_input", "weight_output")


def stored_name(module: str, group: str) -> str:
    """The tensor that holds the matrix of ``group`` for ``module``."""
    return f"{module}.{group}_input.weight"


def group_of(module: str) -> str:
    """The group of a module with a trained rotation; it becomes a Python attribute, so it has no dots."""
    return "rotation_" + re.sub(r"\W", "_", fused_name(module))


def plan_trained(module: str) -> PlannedTensor:
    """Where the trained matrix of ``module`` is stored."""
    return PlannedTensor(stored_name(module, group_of(module)), torch.float32, SHAPE)


def fixed_matrices(quantization: Quantization) -> dict[str, tuple[PlannedTensor, torch.Tensor]]:
    """The Hadamard matrix beside the weight of the first module that it turns."""
    first = next(iter(rotated(quantization, "hadamard")), None)
    if first is None:
        return {}
    planned = PlannedTensor(stored_name(first, HADAMARD_GROUP), torch.float32, SHAPE)
    return {f"{first}.weight": (planned, hadamard_signs().float())}


def transform_config(quantization: Quantization, kept: Collection[str]) -> dict[str, Any]:
    """The library's TransformConfig, empty where nothing is turned."""
    groups: dict[str, dict[str, Any]] = {}
    plain = rotated(quantization, "hadamard")
    if plain:
        everything = len(plain) == len(quantization.layers)
        targets, ignore = ([LINEAR], sorted(kept)) if everything else (plain, [])
        groups[HADAMARD_GROUP] = _group("hadamard", targets, ignore)
    for module in rotated(quantization, "trained"):
        group = groups.setdefault(group_of(module), _group("trained", [], []))
        group["apply"][0]["targets"].append(module)
    return {"config_groups": groups} if groups else {}


def read_transforms(settings: dict[str, Any]) -> Rotations:
    """What ``settings`` say of inputs. Raises FourfoldError for what Fourfold does not compute."""
    config = objects(settings, "transform_config")
    groups = {name: _Group(name, group) for name, group in objects(config, "config_groups").items()}

    def of(module: str) -> _Group | None:
        found = [group for group in groups.values() if group.targets(module)]
        if len(found) > 1:
            raise damaged(
                f"turns the inputs of '{short(module)}' twice, by {found[0].name} and {found[1].name}"
            )
        return found[0] if found else None

    def owner(name: str) -> str | None:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        group = leaf.removesuffix("_input")
        return f"{parent}:{group}" if group != leaf and group in groups else None

    def pick(module: str, stored: Mapping[str, StoredTensor]) -> StoredTensor | None:
        group = of(module)
        assert group is not None
        shared = (matrix for key, matrix in stored.items() if key.endswith(f":{group.name}"))
        return stored.get(f"{module}:{group.name}") or next(shared, None)

    return Rotations(lambda m: group.transform if (group := of(m)) else None, owner, pick)


class _Group:
    """A group of transform_config: the transform of the inputs of its targets, if it has one."""

    def __init__(self, name: str, settings: object):
        self.name, self._apply = name, []
        if not isinstance(settings, dict) or not isinstance(settings.get("apply"), list):
            raise damaged(f"has the transform '{short(name)}' that is applied to nothing")
        self.transform: InputTransform | None = None
        for arguments in settings["apply"]:
            if not isinstance(arguments, dict):
                raise damaged(f"has the transform '{short(name)}' with arguments that are no object")
            if arguments.get("location") not in FUSED_INTO_WEIGHTS:
                self.transform = _recognise(settings, arguments)
                self._apply.append([targets_of(arguments, key) for key in ("targets", "ignore")])

    def targets(self, module: str) -> bool:
        """Whether the inputs of the linear layer ``module`` are turned."""
        return any(t.find(module) is not None and ignore.find(module) is None for t, ignore in self._apply)


def targets_of(settings: dict[str, Any], key: str) -> Targets:
    """The targets under ``key``; which scheme they have says nothing."""
    targets = Targets()
    for target in texts(settings, key):
        targets.add(target, LayerScheme(weight=key))
    return targets


def _group(transform: InputTransform, targets: list[str], ignore: list[str]) -> dict[str, Any]:
    return {
        "apply": [{"ignore": ignore, "inverse": False, "location": "input", "targets": list(targets)}],
        "head_dim": ROTATION_SIZE,
        "precision": "torch.float32",
        "randomize": False,
        "requires_grad": False,
        "type": TYPES[transform],
    }


def _recognise(settings: dict[str, Any], arguments: dict[str, Any]) -> InputTransform:
    known: list[InputTransform] = [t for t, name in TYPES.items() if name == settings.get("type")]
    transform = known[0] if known else None
    inverse = bool(arguments.get("inverse"))
    if (
        transform is None
        or arguments.get("location") != "input"
        or settings.get("head_dim") != ROTATION_SIZE
        or settings.get("randomize")
        or (inverse and transform == "trained")
    ):
        raise FourfoldError(
            "This checkpoint rotates or otherwise transforms its activations while it runs in a way that "
            f"Fourfold does not (transform_config in quantization_config: {short(str(settings))}); it turns "
            f"the inputs of linear layers in runs of {ROTATION_SIZE}. Its weights alone would give wrong "
            "answers. Start from the unquantized model."
        )
    return transform
