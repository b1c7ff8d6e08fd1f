"""Why torch must compute a model: what of it a C++ program's operations cannot say."""

import torch

from fourfold.engine.decoder import Decoder, Layer
from fourfold.engine.experts import MixtureOfExperts
from fourfold.engine.kv_format import AsComputed, Fp8, KVFormat
from fourfold.engine.layers import FusedLinear, GatedMLP, Linear
from fourfold.engine.requests import EngineConfig
from fourfold.engine.weights import same_rotation
from fourfold.kernels import native_available, native_problem
from fourfold.kernels.cpu.packed import TILE_ROWS
from fourfold.kernels.expanded import exact_in_bfloat16

PACKED_FORMATS = ("mxfp4", "mxint8")


def obstacle(model: Decoder, form: KVFormat, config: EngineConfig) -> str | None:
    """What of ``model`` the program has no words for, or None."""
    if not native_available():
        return f"the C++ extension cannot be used ({native_problem()})"
    if model.dtype != torch.bfloat16 and config.arithmetic != "int8":
        return f"the model is to be computed in {str(model.dtype).removeprefix('torch.')}"
    if not isinstance(form, AsComputed | Fp8):
        return f"the KV cache is held in {form.name}"
    if model.shape.head_dim % 16:
        return f"heads of {model.shape.head_dim} features are no multiple of 16"
    for layer in model.layers:
        if problem := layer_obstacle(layer):
            return problem
    if model.head.format is not None and not exact_in_bfloat16(model.head.format):
        return f"the head is in {model.head.format}"
    return inputs_obstacle(model.head)


def layer_obstacle(layer: Layer) -> str | None:
    """Why ``layer`` cannot be computed, or None."""
    mlp, linears = layer.mlp, [layer.attention.qkv, layer.attention.output]
    if isinstance(mlp, MixtureOfExperts):
        if problem := mixture_obstacle(mlp):
            return problem
        linears += both_of(mlp.experts)
    else:
        linears += both_of([mlp])
    problems = (linear_obstacle(part) for linear in linears for part in linear.parts)
    return next(filter(None, problems), None)


def mixture_obstacle(mixture: MixtureOfExperts) -> str | None:
    """Why the experts cannot be computed together, or None."""
    if mixture.router.format is not None:
        return "the router is quantized"
    kinds = {part.format for linear in both_of(mixture.experts) for part in linear.parts}
    fused = all(isinstance(expert.gate_up, Linear) for expert in mixture.experts)
    if len(kinds) > 1 or not fused:
        return "experts are in different formats"
    first = mixture.experts[0]
    for expert in mixture.experts[1:]:
        for one, other in ((first.gate_up, expert.gate_up), (first.down, expert.down)):
            if not same_inputs(one.parts[0], other.parts[0]):
                return "experts turn or round their inputs in different ways"
    width = first.down.shape[1]
    return f"experts are {width} wide, no multiple of {TILE_ROWS}" if width % TILE_ROWS else None


def linear_obstacle(linear: Linear) -> str | None:
    """Why ``linear`` cannot be computed, or None."""
    if linear.format is not None and not in_blocks(linear):
        return f"weights are in {linear.format}"
    return inputs_obstacle(linear)


def inputs_obstacle(linear: Linear) -> str | None:
    """Why the inputs of ``linear`` cannot be what they must, or None."""
    if linear.activation is not None and not exact_in_bfloat16(linear.activation):
        return f"inputs are rounded to {linear.activation}"
    return "inputs are rounded with feedback" if linear.feedback else None


def both_of(mlps: list[GatedMLP]) -> list[Linear | FusedLinear]:
    """The linear layers of each of ``mlps``."""
    return [linear for mlp in mlps for linear in (mlp.gate_up, mlp.down)]


def in_blocks(linear: Linear) -> bool:
    """Whether the program holds the weight in blocks too; others become bfloat16."""
    return linear.format in PACKED_FORMATS


def same_inputs(one: Linear, other: Linear) -> bool:
    """Whether both make the same of their inputs."""
    return one.activation == other.activation and same_rotation([one, other])
