"""Which inputs are rounded with feedback: ``input_feedback`` in config.json, modules by size of group.

No dialect has a word for it, and serving engines pass over keys of config.json that they do not know: they
round to nearest.
"""

from typing import Any, get_args

from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import FeedbackGroup, Quantization

KEY = "input_feedback"
GROUPS = {str(group): group for group in get_args(FeedbackGroup)}


def feedback_config(quantization: Quantization) -> dict[str, list[str]]:
    """What config.json says; empty where every input is rounded to nearest."""
    found: dict[str, list[str]] = {}
    for module, scheme in quantization.layers.items():
        if scheme.input_feedback is not None:
            found.setdefault(str(scheme.input_feedback), []).append(module)
    return found


def with_feedback(quantization: Quantization, config: dict[str, Any]) -> Quantization:
    """``quantization`` and what ``config``, from which it is taken out, says of feedback.

    Raises FourfoldError for what cannot be understood.
    """
    found = config.pop(KEY, None)
    if found is None:
        return quantization
    layers = dict(quantization.layers)
    try:
        for group, modules in found.items():
            size = GROUPS[group]
            for module in modules:
                layers[module] = layers[module].model_copy(update={KEY: size})
    except (AttributeError, KeyError, TypeError) as error:
        raise FourfoldError(
            f"{KEY} in config.json must map the size of a group (32, 64 or 128) to names of quantized "
            f"modules ({type(error).__name__}: {error}). Copy config.json from the model's origin."
        ) from error
    return quantization.model_copy(update={"layers": layers})
