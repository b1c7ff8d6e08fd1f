"""The model card: what a checkpoint is, from configuration and headers alone."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from fourfold.checkpoint.rotations import INPUT_ROTATION
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.quantization import Quantization
from fourfold.core.records import ModelCard

SHORT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def make_card(
    name: str,
    config: dict[str, Any],
    infos: Iterable[TensorInfo],
    quantization: Quantization,
    notes: list[str],
) -> ModelCard:
    """The card of a model named ``name`` with these tensors; ``parameters`` counts stored values."""
    infos = list(infos)
    # a rotation is no parameter of the model, though its bytes count
    parameters = sum(info.numel for info in infos if not info.name.endswith(INPUT_ROTATION))
    size_bytes = sum(info.nbytes for info in infos)
    activations = Counter(scheme.activation for scheme in quantization.layers.values())
    return ModelCard(
        name=name,
        architecture=architecture(config),
        parameters=parameters,
        weight_format=weight_format(infos),
        activation_format=activations.most_common(1)[0][0] if activations else None,
        kv_cache_format=quantization.kv_cache,
        size_bytes=size_bytes,
        bits_per_weight=size_bytes * 8 / parameters if parameters else 0.0,
        notes=notes,
    )


def architecture(config: dict[str, Any]) -> str:
    """The class that config.json names, or its model_type."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    return str(config.get("model_type", "unknown"))


def weight_format(infos: Iterable[TensorInfo]) -> str:
    """The format of most quantized values, or the dtype of most values when none is quantized."""
    plain: Counter[str] = Counter()
    quantized: Counter[str] = Counter()
    for info in infos:
        if info.format is not None:
            quantized[info.format] += info.numel
        elif info.dtype is not None:
            plain[SHORT_DTYPES.get(info.dtype, str(info.dtype).removeprefix("torch."))] += info.numel
    counted = quantized or plain
    return counted.most_common(1)[0][0] if counted else "none"
