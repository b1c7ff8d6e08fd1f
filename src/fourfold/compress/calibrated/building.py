"""transformers' modules of a configuration: the model without weights, and what it computes by itself."""

import re
from typing import Any

import torch
from torch import nn

from fourfold.checkpoint.dialect import TOWER
from fourfold.core.errors import FourfoldError
from fourfold.core.imports import importing

NUMBERED = re.compile(r"(^|\.)(layers|h|blocks)$")


@importing()
def build(config: dict[str, Any]) -> nn.Module:
    """transformers' causal language model of ``config``, or the multimodal one around it, on the meta device.

    Raises FourfoldError when it does not know the type or cannot make sense of the configuration.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    # nothing here may lead to code that came with the model
    settings = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
    model_type = str(config.get("model_type"))
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(floats_in(settings))
        parsed._experts_implementation = "eager"
        known = type(parsed) in AutoModelForCausalLM._model_mapping
        made_by = AutoModelForCausalLM if known else AutoModelForMultimodalLM
        with torch.device("meta"):
            return made_by.from_config(parsed, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise FourfoldError(
            f"transformers cannot build a causal language model of the type '{model_type}' "
            f"({' '.join(str(error).split())[:200]}). Passes with calibration need its modules: use a recipe "
            "without calibration (mxfp4), or a transformers that knows the type."
        ) from error


def floats_in(value: Any) -> Any:
    """A configuration's infinities and NaN, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        tag = value.get("__float__")
        return float(tag) if isinstance(tag, str) else {key: floats_in(item) for key, item in value.items()}
    return [floats_in(item) for item in value] if isinstance(value, list) else value


def make_buffers(part: nn.Module, decoder: nn.Module) -> None:
    """Let ``decoder`` initialise the buffers of ``part`` that no checkpoint holds: rotary frequencies,
    embedding scales. What it does not know of becomes NaN.
    """
    for buffer in part.buffers():
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))
    for module in part.modules():
        if module._buffers:
            decoder._init_weights(module)  # pyright: ignore[reportCallIssue] (PreTrainedModel's)


def find_layers(net: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the largest numbered list of modules outside other towers."""
    lists = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.ModuleList) and NUMBERED.search(name)
        if not any(TOWER.search(part) or part == "experts" for part in name.split("."))
    ]
    if not lists:
        raise FourfoldError(
            f"{type(net).__name__} has no list of decoder layers that Fourfold knows. Use a recipe without "
            "calibration (mxfp4)."
        )
    return max(lists, key=lambda item: sum(1 for _ in item[1].modules()))
