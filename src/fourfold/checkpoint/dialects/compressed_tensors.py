"""compressed-tensors: what llm-compressor writes and vLLM, SGLang and transformers read.

With one scheme for all modules the configuration says ``targets: ["Linear"]`` and lists what is kept under
``ignore``; vLLM's head is no Linear and is named too. With several, every group names its modules, because
vLLM asks for the class before it asks for the parts of a fused layer. Source: the writers of
compressed-tensors 0.20 and llm-compressor 0.14 (model_free_ptq).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fourfold.checkpoint.block_dialect import (
    OWN_KEY,
    SCALE,
    BlockDialect,
    SchemeOf,
    by_scheme,
    damaged,
    objects,
    texts,
)
from fourfold.checkpoint.dialect import EXPERTS
from fourfold.checkpoint.dialects import _transforms
from fourfold.checkpoint.dialects._targets import EXPRESSION, LINEAR, Targets
from fourfold.checkpoint.layout import Field, Layout
from fourfold.checkpoint.rotations import Rotations, without_rotations
from fourfold.checkpoint.storage.header import PlannedTensor, short
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import KVCacheFormat, LayerScheme, Quantization

Name = TypeVar("Name", bound=str)

VERSION = "0.20.0"  # of the library whose configuration this is
HEAD = "lm_head"
PACKED, WEIGHT = "weight_packed", "weight"
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Arguments:
    """The library's QuantizationArgs, as far as they tell formats apart."""

    type: str
    num_bits: int
    strategy: str
    group_size: int | None = None

    def written(self, *, dynamic: bool, scale_dtype: str | None = None) -> dict[str, Any]:
        """All fields, as the library writes them."""
        return {
            "actorder": None,
            "block_structure": None,
            "dynamic": dynamic,
            "group_size": self.group_size,
            "num_bits": self.num_bits,
            "observer": None,
            "observer_kwargs": {},
            "scale_dtype": scale_dtype,
            "strategy": self.strategy,
            "symmetric": True,
            "type": self.type,
            "zp_dtype": None,
        }


@dataclass(frozen=True)
class Storage:
    """How a weight format is stored, what the library calls that, and its arguments."""

    layout: Layout
    format: str
    arguments: Arguments
    scale_dtype: str | None = None


def _int4(group: int) -> Storage:
    shape = Field("weight_shape", torch.int64)
    layout = Layout(Field(PACKED, torch.int32), Field(SCALE, torch.float16), shape=shape, offset_binary=True)
    return Storage(layout, "pack-quantized", Arguments("int", 4, "group", group))


def _mx(suffix: str, dtype: torch.dtype, bits: int, name: str) -> Storage:
    layout = Layout(Field(suffix, dtype), Field(SCALE, torch.uint8))
    return Storage(layout, name, Arguments("float", bits, "group", 32), "torch.uint8")


def _fp8(strategy: str, scale: Field) -> Storage:
    return Storage(Layout(Field(WEIGHT, E4M3), scale), "float-quantized", Arguments("float", 8, strategy))


STORAGE = {
    "mxfp4": _mx(PACKED, torch.uint8, 4, "mxfp4-pack-quantized"),
    "mxfp6-e2m3": _mx(PACKED, torch.uint8, 6, "mxfp6-pack-quantized"),
    "mxfp8-e4m3": _mx(WEIGHT, E4M3, 8, "mxfp8-quantized"),
    "nvfp4": Storage(
        Layout(Field(PACKED, torch.uint8), Field(SCALE, E4M3), Field("weight_global_scale", torch.float32)),
        "nvfp4-pack-quantized",
        Arguments("float", 4, "tensor_group", 16),
        "torch.float8_e4m3fn",
    ),
    "int4-g32": _int4(32),
    "int4-g64": _int4(64),
    "int4-g128": _int4(128),
    "fp8-tensor": _fp8("tensor", Field(SCALE, torch.float32, ndim=1)),
    "fp8-channel": _fp8("channel", Field(SCALE, torch.float32)),
}
E8M0_ACTIVATIONS = ("mxfp4", "mxfp6-e2m3", "mxfp8-e4m3")
ACTIVATIONS = {
    "mxfp4": Arguments("float", 4, "group", 32),
    "mxfp6-e2m3": Arguments("float", 6, "group", 32),
    "mxfp8-e4m3": Arguments("float", 8, "group", 32),
    "fp8-token": Arguments("float", 8, "token"),
    "fp8-tensor": Arguments("float", 8, "tensor"),
}
KV_CACHE: dict[KVCacheFormat, Arguments] = {
    "fp8": Arguments("float", 8, "tensor"),
    "fp8-head": Arguments("float", 8, "attn_head"),
}


class CompressedTensors(BlockDialect):
    """The dialect ``compressed-tensors``."""

    name = "compressed-tensors"
    method = "compressed-tensors"
    layouts = {form: storage.layout for form, storage in STORAGE.items()}
    kv_projections = {".k_proj": ".k_scale", ".v_proj": ".v_scale"}
    kv_shapes = {"fp8": lambda count: (count,), "fp8-head": lambda count: (count, 1, 1)}

    rotation_times = _transforms.STORED_TIMES

    def read_config(self, settings: dict[str, Any]) -> tuple[SchemeOf, KVCacheFormat | None]:
        """Groups with targets: a name, ``re:`` and an expression, or the class Linear."""
        _refuse_sparsity(settings)
        rules = objects(objects(settings, OWN_KEY), "scale_rules")
        targets = _read_groups(settings, rules)
        kv = settings.get("kv_cache_scheme")
        cache = None if kv is None else _recognise("KV cache", kv, KV_CACHE, dynamic=False)
        return targets.scheme_of, cache

    def read_rotations(self, settings: dict[str, Any]) -> Rotations:
        """transform_config."""
        return _transforms.read_transforms(settings)

    def plan_rotation(self, module: str) -> PlannedTensor:
        """As the library names the parameters of its transforms."""
        return _transforms.plan_trained(module)

    def fixed_rotations(self, quantization: Quantization) -> dict[str, tuple[PlannedTensor, torch.Tensor]]:
        """The Hadamard matrix, once."""
        return _transforms.fixed_matrices(quantization)

    def says_kept(self, settings: dict[str, Any], module: str) -> bool:
        """By ``ignore``, or because no group targets it."""
        ignore = Targets()
        for target in texts(settings, "ignore"):
            ignore.add(target, LayerScheme(weight="kept"))
        return ignore.find(module) is not None or _read_groups(settings, {}).find(module) is None

    def quantization_config(
        self, quantization: Quantization, kept_linears: Collection[str]
    ) -> dict[str, Any] | None:
        """config_groups by scheme, ignore, kv_cache_scheme."""
        if not quantization.layers and quantization.kv_cache is None:
            return None
        groups = by_scheme(without_rotations(quantization))
        names = {f"group_{i}": scheme for i, scheme in enumerate(groups)}
        formats = {_format_name(scheme) for scheme in groups}
        kv = KV_CACHE[quantization.kv_cache].written(dynamic=False) if quantization.kv_cache else None
        return {
            "config_groups": {
                name: self._write_group(scheme, groups[scheme] if len(groups) > 1 else _all(groups[scheme]))
                for name, scheme in names.items()
            },
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "global_compression_ratio": None,
            "ignore": _ignored(kept_linears),
            "kv_cache_scheme": kv,
            "quant_method": self.method,
            "quantization_status": "compressed",
            "transform_config": _transforms.transform_config(quantization, kept_linears),
            "version": VERSION,
            OWN_KEY: {"scale_rules": {name: scheme.scale_rule for name, scheme in names.items()}},
        }

    def _write_group(self, scheme: LayerScheme, targets: list[str]) -> dict[str, Any]:
        storage, inputs = STORAGE[scheme.weight], None
        if scheme.activation is not None:
            self.known(ACTIVATIONS, scheme.activation, targets[0], "activations")
            dtype = "torch.uint8" if scheme.activation in E8M0_ACTIVATIONS else None
            inputs = ACTIVATIONS[scheme.activation].written(dynamic=True, scale_dtype=dtype)
        return {
            "format": _format_name(scheme),
            "input_activations": inputs,
            "output_activations": None,
            "targets": targets,
            "weights": storage.arguments.written(dynamic=False, scale_dtype=storage.scale_dtype),
        }


def _all(modules: Collection[str]) -> list[str]:
    return [LINEAR, *(module for module in modules if module.endswith(HEAD))]


def _ignored(kept: Collection[str]) -> list[str]:
    """``kept``, and for fused experts the modules that vLLM asks for, which are those of each expert."""
    inside = [rf"{EXPRESSION}.*{re.escape(module)}\..*" for module in kept if module.endswith(EXPERTS)]
    return [*kept, *inside]


def _format_name(scheme: LayerScheme) -> str:
    name = STORAGE[scheme.weight].format
    # the library tells weight-only FP8 from FP8 with activations by the name of the format
    return "naive-quantized" if name == "float-quantized" and scheme.activation is None else name


def _refuse_sparsity(settings: dict[str, Any]) -> None:
    sparsity = objects(settings, "sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise FourfoldError(
            "This checkpoint leaves out zeros of its weights (sparsity_config in quantization_config: "
            f"{short(str(sparsity))}), which Fourfold does not read. Start from the unquantized model."
        )


def _read_groups(settings: dict[str, Any], rules: dict[str, Any]) -> Targets:
    if not isinstance(settings.get("config_groups"), dict):
        raise damaged("has no config_groups")
    targets = Targets()
    for name, group in settings["config_groups"].items():
        rule = rules.get(name)
        _read_group(name, group, rule if isinstance(rule, str) else None, targets)
    return targets


def _read_group(name: str, group: object, rule: str | None, targets: Targets) -> None:
    if not isinstance(group, dict) or not texts(group, "targets"):
        raise damaged(f"has the config group '{short(name)}' without targets")
    weights = {form: storage.arguments for form, storage in STORAGE.items()}
    weight = _recognise(f"weights of '{short(name)}'", group.get("weights"), weights, dynamic=False)
    inputs, activation = group.get("input_activations"), None
    if inputs is not None:
        activation = _recognise(f"activations of '{short(name)}'", inputs, ACTIVATIONS, dynamic=True)
    for target in texts(group, "targets"):
        targets.add(target, LayerScheme(weight=weight, activation=activation, scale_rule=rule))


def _recognise(what: str, given: object, known: Mapping[Name, Arguments], *, dynamic: bool) -> Name:
    if (
        isinstance(given, dict)
        and given.get("symmetric", True) is True
        and bool(given.get("dynamic")) == dynamic
    ):
        key = [given.get(field) for field in ("type", "num_bits", "strategy", "group_size")]
        for form, arguments in known.items():
            if key == [arguments.type, arguments.num_bits, arguments.strategy, arguments.group_size]:
                return form
    raise FourfoldError(
        f"The {what} in quantization_config ({short(str(given))}) are of a kind that Fourfold does not "
        f"read; it reads {', '.join(known)}. Start from the unquantized model."
    )


DIALECT = CompressedTensors()
