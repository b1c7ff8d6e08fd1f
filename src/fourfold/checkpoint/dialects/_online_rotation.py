"""How Quark says that inputs are turned while the model runs: a RotationConfig in algo_config.

``online_config.online_rotation_layers`` names the modules, ``rotation_size`` the length of a run, and
``trainable`` what is stored beside each of them as ``<module>.input_rotation``: the signs of the Hadamard
matrix in int8, or a trained matrix in float64. There is one such configuration, so a checkpoint has the one
or the other. Of its other fields, R2 is folded into weights, and R3 turns queries and keys alike, so that it
cancels out. Source: amd-quark 0.13 (RotationConfig, QParamsLinearWithRotation), vLLM's quark/transform.py.
"""

from typing import Any

import torch

from fourfold.checkpoint.block_dialect import texts
from fourfold.checkpoint.rotations import INPUT_ROTATION, SHAPE, Rotations, rotated
from fourfold.checkpoint.storage.header import PlannedTensor, short
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import InputTransform, Quantization
from fourfold.formats import ROTATION_SIZE, hadamard_signs

NAMES = ("rotation", "quarot")


def plan_trained(module: str) -> PlannedTensor:
    """Where the trained matrix of ``module`` is stored."""
    return PlannedTensor(module + INPUT_ROTATION, torch.float64, SHAPE)


def fixed_matrices(quantization: Quantization) -> dict[str, tuple[PlannedTensor, torch.Tensor]]:
    """The signs of the Hadamard matrix beside every weight that it turns."""
    return {
        f"{m}.weight": (PlannedTensor(m + INPUT_ROTATION, torch.int8, SHAPE), hadamard_signs())
        for m in rotated(quantization, "hadamard")
    }


def algorithms(quantization: Quantization) -> list[dict[str, Any]] | None:
    """What algo_config says. Raises UsageError for Hadamard and trained rotations in one checkpoint."""
    plain, trained = rotated(quantization, "hadamard"), rotated(quantization, "trained")
    if plain and trained:
        raise UsageError(
            f"The dialect quark has one kind of rotation for a whole checkpoint, but {plain[0]} is turned by "
            f"the Hadamard matrix and {trained[0]} by a trained one. Choose --dialect compressed-tensors."
        )
    if not plain and not trained:
        return None
    return [
        {
            "backbone": "model",
            "mlp": "mlp",
            "model_decoder_layers": "model.layers",
            "name": "rotation",
            "o_proj": "self_attn.o_proj",
            "online_config": {
                "online_rotation_layers": sorted(plain + trained),
                "shared_parallel": True,
                "use_input_prescale": False,
            },
            "online_r1_rotation": True,
            "r1": True,
            "r2": False,
            "r3": False,
            "r4": False,
            "random_r1": False,
            "random_r2": False,
            "rotation_size": ROTATION_SIZE,
            "scaling_layers": {"first_layer": [], "last_layer": [], "middle_layers": []},
            "self_attn": "self_attn",
            "smooth_positions": [] if trained else None,
            "train_smooth": False if trained else None,
            "trainable": bool(trained),
            "v_proj": "self_attn.v_proj",
        }
    ]


def read_algorithms(given: object) -> Rotations:
    """What algo_config says of inputs; what other algorithms did to weights is done.

    Raises FourfoldError for rotations that Fourfold does not compute.
    """
    kinds: dict[str, InputTransform] = {}
    for algorithm in given if isinstance(given, list) else [given]:
        if isinstance(algorithm, dict) and algorithm.get("name") in NAMES:
            kinds |= dict.fromkeys(
                _modules(algorithm), "trained" if algorithm.get("trainable") else "hadamard"
            )

    def owner(name: str) -> str | None:
        return module if (module := name.removesuffix(INPUT_ROTATION)) != name and module in kinds else None

    return Rotations(kinds.get, owner, lambda module, stored: stored.get(module))


def _modules(algorithm: dict[str, Any]) -> list[str]:
    online = algorithm.get("online_config")
    online = online if isinstance(online, dict) else {}
    named = texts(online, "online_rotation_layers")
    is_online = bool(named or algorithm.get("online_r1_rotation") or algorithm.get("r4", True))
    fits = algorithm.get("rotation_size") == ROTATION_SIZE and not online.get("use_input_prescale")
    if is_online and not (named and fits):
        raise FourfoldError(
            "This checkpoint rotates activations while it runs (algo_config in quantization_config: "
            f"{short(str(algorithm))}) in a way that Fourfold does not: it turns the inputs of named layers "
            f"in runs of {ROTATION_SIZE}. Its weights alone would give wrong answers. Start from the "
            "unquantized model."
        )
    return named
