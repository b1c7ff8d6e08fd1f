"""Round to nearest: every weight by itself, straight to its format, without calibration.

The price is accuracy that methods which look at activations can win back; what it buys is speed, and numbers
that are equal to what Quark and llm-compressor write.
"""

from dataclasses import replace
from functools import partial

import torch

from fourfold.checkpoint.dialect import module_of
from fourfold.compress.model import Entry, Model, formatted, is_finite
from fourfold.compress.pipeline import Pass
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import LayerScheme
from fourfold.formats import BlockTensor, get_format


def round_model(model: Model) -> Model:
    """Each weight that the scheme names becomes a BlockTensor, rounded when it is asked for."""
    rounded = {}
    for name, entry in model.entries.items():
        scheme = model.quantization.layer(module_of(name)) if name.endswith(".weight") else None
        if scheme is not None:
            info = formatted(entry.info, scheme.weight)
            rounded[name] = replace(entry, info=info, load=partial(round_weight, name, entry, scheme))
    return model.with_entries(rounded)


def round_weight(name: str, entry: Entry, scheme: LayerScheme) -> BlockTensor:
    """``entry``'s weight [out, in] in the scheme's format. Raises FourfoldError when it holds NaN or Inf."""
    weight = entry.load()
    assert not isinstance(weight, BlockTensor), "planning refuses sources that are quantized already"
    return round_to_nearest(name, weight, scheme)


def round_to_nearest(name: str, weight: torch.Tensor, scheme: LayerScheme) -> BlockTensor:
    """``weight`` [out, in] in the scheme's format. Raises FourfoldError when it holds NaN or Inf."""
    check_finite(name, weight)
    return get_format(scheme.weight).quantize(weight, scheme.scale_rule)


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raise FourfoldError that names the weight when it holds NaN or Inf."""
    if not is_finite(weight):
        raise FourfoldError(
            f"{name} holds NaN or Inf, which would spoil every value that shares its scale. The source is "
            f"damaged or the model diverged: fetch it again, or add a `keep` entry '{module_of(name)}' to "
            "the recipe."
        )


PASS = Pass("rtn", "round", apply=round_model)
