"""Quark: what AMD's quantizer writes, and vLLM and SGLang read (``quant_method: quark``).

The most common scheme is the global one; modules that differ are named in layer_quant_config, what is kept in
exclude. An FP8 KV cache is said three times: export.kv_cache_group, layer_quant_config with output_tensors,
and kv_cache_quant_config. Its readers know one scale for a layer's keys and one for its values, no more, and
apply them to rotated keys whatever kv_cache_post_rope says. Source: amd-quark 0.13, its file-to-file
quantization and its safetensors export; vLLM's quark.py. MXFP8 and INT4 weights are not written, because
Quark's own readers in vLLM take none.
"""

import fnmatch
from collections.abc import Collection, Mapping
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
from fourfold.checkpoint.dialects import _online_rotation
from fourfold.checkpoint.layout import Field, Layout
from fourfold.checkpoint.rotations import Rotations, without_rotations
from fourfold.checkpoint.storage.header import PlannedTensor, short
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import KVCacheFormat, LayerScheme, Quantization

Name = TypeVar("Name", bound=str)

VERSION = "0.13"  # of amd-quark, whose configuration this is
KV_PATTERNS = ("*k_proj", "*v_proj")
CALCULATION_MODES = ("even", "floor", "ceil")
CODES = "weight"
E8M0 = Layout(Field(CODES, torch.uint8), Field(SCALE, torch.uint8))
E4M3 = Field(CODES, torch.float8_e4m3fn)

# dtype, qscheme, ch_axis, group_size
Spec = tuple[str, str, int | None, int | None]
WEIGHTS: dict[str, Spec] = {
    "mxfp4": ("fp4", "per_group", -1, 32),
    "mxfp6-e2m3": ("fp6_e2m3", "per_group", -1, 32),
    "mxfp6-e3m2": ("fp6_e3m2", "per_group", -1, 32),
    "fp8-tensor": ("fp8_e4m3", "per_tensor", None, None),
    "fp8-channel": ("fp8_e4m3", "per_channel", 0, None),
}
ACTIVATIONS: dict[str, Spec] = {
    "mxfp4": ("fp4", "per_group", -1, 32),
    "mxfp6-e2m3": ("fp6_e2m3", "per_group", -1, 32),
    "mxfp6-e3m2": ("fp6_e3m2", "per_group", -1, 32),
    "mxfp8-e4m3": ("fp8_e4m3", "per_group", -1, 32),
    "mxfp8-e5m2": ("fp8_e5m2", "per_group", -1, 32),
    "fp8-tensor": ("fp8_e4m3", "per_tensor", None, None),
    "fp8-token": ("fp8_e4m3", "per_channel", 0, None),
}
KV_CACHE: dict[KVCacheFormat, Spec] = {"fp8": ("fp8_e4m3", "per_tensor", None, None)}
OBSERVERS = {
    "per_group": "PerBlockMXObserver",
    "per_tensor": "PerTensorMinMaxObserver",
    "per_channel": "PerChannelMinMaxObserver",
}


class Quark(BlockDialect):
    """The dialect ``quark``."""

    name = "quark"
    method = "quark"
    layouts = {
        "mxfp4": E8M0,
        "mxfp6-e2m3": E8M0,
        "mxfp6-e3m2": E8M0,
        "fp8-tensor": Layout(E4M3, Field(SCALE, torch.float32, ndim=0)),
        "fp8-channel": Layout(E4M3, Field(SCALE, torch.float32, ndim=1)),
    }
    kv_projections = {projection: f"{projection}.output_scale" for projection in (".k_proj", ".v_proj")}
    kv_shapes = {"fp8": lambda count: ()}

    def read_config(self, settings: dict[str, Any]) -> tuple[SchemeOf, KVCacheFormat | None]:
        """The first pattern of layer_quant_config that fits a module, else the global scheme."""
        if objects(settings, "export").get("weight_format", "real_quantized") != "real_quantized":
            raise FourfoldError(
                "This Quark checkpoint holds fake-quantized weights (export.weight_format), which say "
                "nothing of how they were rounded. Export it again with weight_format real_quantized."
            )
        rules = objects(objects(settings, OWN_KEY), "scale_rules")
        return _Layers(settings, rules).scheme_of, _read_kv(settings)

    def read_rotations(self, settings: dict[str, Any]) -> Rotations:
        """algo_config."""
        return _online_rotation.read_algorithms(settings.get("algo_config"))

    def plan_rotation(self, module: str) -> PlannedTensor:
        """As Quark's QParamsLinearWithRotation names it."""
        return _online_rotation.plan_trained(module)

    def fixed_rotations(self, quantization: Quantization) -> dict[str, tuple[PlannedTensor, torch.Tensor]]:
        """The signs of the Hadamard matrix, for each module."""
        return _online_rotation.fixed_matrices(quantization)

    def says_kept(self, settings: dict[str, Any], module: str) -> bool:
        """By ``exclude``."""
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in texts(settings, "exclude"))

    def quantization_config(
        self, quantization: Quantization, kept_linears: Collection[str]
    ) -> dict[str, Any] | None:
        """global_quant_config, layer_quant_config, exclude, and the KV cache where there is one."""
        algorithms = _online_rotation.algorithms(quantization)
        quantization = without_rotations(quantization)
        groups = by_scheme(quantization)
        if not groups:
            if quantization.kv_cache is not None:
                raise UsageError(
                    "The dialect quark cannot store an FP8 KV cache beside unquantized weights only. Round "
                    "some weights too, or choose --dialect compressed-tensors."
                )
            return None
        first, *others = groups
        layers = {m: self._layer(scheme, m) for scheme in others for m in groups[scheme]}
        cache = self._kv_layers(quantization, first) if quantization.kv_cache else {}
        rules = {module: scheme.scale_rule for scheme in others for module in groups[scheme]}
        return {
            "algo_config": algorithms,
            "exclude": sorted(kept_linears),
            "export": {
                "kv_cache_group": list(KV_PATTERNS) if cache else [],
                "min_kv_scale": 0.0,
                "pack_method": "reorder",
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
            "global_quant_config": self._layer(first, "the most common scheme"),
            "kv_cache_post_rope": False,
            "kv_cache_quant_config": cache,
            "layer_quant_config": layers | cache,
            "layer_type_quant_config": {},
            "quant_method": self.method,
            "quant_mode": "eager_mode",
            "softmax_quant_spec": None,
            "version": VERSION,
            OWN_KEY: {"scale_rules": {"global": first.scale_rule, **rules}},
        }

    def _layer(self, scheme: LayerScheme, layer: str) -> dict[str, Any]:
        inputs = None
        if scheme.activation is not None:
            self.known(ACTIVATIONS, scheme.activation, layer, "activations")
            inputs = _written(ACTIVATIONS[scheme.activation], dynamic=True, rule="even")
        weight = _written(WEIGHTS[scheme.weight], dynamic=False, rule=scheme.scale_rule)
        return {
            "bias": None,
            "input_tensors": inputs,
            "output_tensors": None,
            "target_device": None,
            "weight": weight,
        }

    def _kv_layers(self, quantization: Quantization, first: LayerScheme) -> dict[str, Any]:
        """Patterns where every projection has the global scheme, else one entry for each projection."""
        assert quantization.kv_cache is not None
        output = _written(KV_CACHE[quantization.kv_cache], dynamic=False, rule=None) | {"scale_type": None}
        schemes = {m: s for m, s in quantization.layers.items() if m.endswith(tuple(self.kv_projections))}
        if not schemes:
            empty = {"bias": None, "input_tensors": None, "target_device": None, "weight": None}
            return dict.fromkeys(KV_PATTERNS, empty | {"output_tensors": output})
        if all(scheme == first for scheme in schemes.values()):
            schemes = dict.fromkeys(KV_PATTERNS, first)
        return {m: self._layer(scheme, m) | {"output_tensors": output} for m, scheme in schemes.items()}


class _Layers:
    """The schemes that a configuration gives, by pattern."""

    def __init__(self, settings: dict[str, Any], rules: dict[str, Any]):
        self._names: dict[str, LayerScheme] = {}
        self._patterns: dict[str, LayerScheme] = {}
        for pattern, layer in objects(settings, "layer_quant_config").items():
            if isinstance(layer, dict) and layer.get("weight") is None:
                continue  # says only how the KV cache is held
            target = self._patterns if "*" in pattern else self._names
            target[pattern] = _read_layer(pattern, layer, rules.get(pattern))
        self._default = None
        if settings.get("global_quant_config") is not None:
            self._default = _read_layer("global", settings["global_quant_config"], rules.get("global"))

    def scheme_of(self, module: str) -> LayerScheme:
        """The scheme of a module that is stored quantized."""
        if module in self._names:
            return self._names[module]
        for pattern, scheme in self._patterns.items():
            if fnmatch.fnmatchcase(module, pattern):
                # a pattern for the KV cache repeats the global weights, and cannot tell an unusual rule
                return self._same_rule(scheme)
        if self._default is None:
            raise damaged(f"says nothing of '{short(module)}', which is stored quantized")
        return self._default

    def _same_rule(self, scheme: LayerScheme) -> LayerScheme:
        default = self._default
        if default is None or scheme.model_copy(update={"scale_rule": default.scale_rule}) != default:
            return scheme
        return default


def _read_layer(name: str, layer: object, rule: object) -> LayerScheme:
    if not isinstance(layer, dict):
        raise damaged(f"has the entry '{short(name)}' that is not an object")
    weight, inputs = layer.get("weight"), layer.get("input_tensors")
    form = _recognise(f"weights of '{short(name)}'", weight, WEIGHTS, dynamic=False)
    activation = (
        _recognise(f"inputs of '{short(name)}'", inputs, ACTIVATIONS, dynamic=True) if inputs else None
    )
    if not isinstance(rule, str):
        mode = weight.get("scale_calculation_mode") if isinstance(weight, dict) else None
        rule = mode if mode in CALCULATION_MODES else None
    return LayerScheme(weight=form, activation=activation, scale_rule=rule)


def _read_kv(settings: dict[str, Any]) -> KVCacheFormat | None:
    layers = objects(settings, "kv_cache_quant_config") or objects(settings, "layer_quant_config")
    group = texts(objects(settings, "export"), "kv_cache_group")
    for pattern, layer in layers.items():
        outputs = layer.get("output_tensors") if isinstance(layer, dict) else None
        if outputs and any(pattern == name or fnmatch.fnmatchcase(pattern, name) for name in group):
            return _recognise("KV cache", outputs, KV_CACHE, dynamic=False)
    return None


def _written(spec: Spec, *, dynamic: bool, rule: str | None) -> dict[str, Any]:
    dtype, scheme, axis, group = spec
    is_mx = scheme == "per_group"
    return {
        "block_size": None,
        "ch_axis": axis,
        "dtype": dtype,
        "enable_buffer_reuse": False,
        "group_size": group,
        "is_dynamic": dynamic,
        "is_scale_quant": False,
        "max_input_numel": 4194304,
        "mx_element_dtype": None,
        "observer_cls": OBSERVERS[scheme],
        "qscheme": scheme,
        "round_method": "half_even",
        "scale_calculation_mode": rule if is_mx and rule in CALCULATION_MODES else None,
        "scale_format": "e8m0" if is_mx else None,
        "scale_type": "float",
        "symmetric": None if is_mx else True,
        "zero_point_type": "int32",
    }


def _recognise(what: str, given: object, known: Mapping[Name, Spec], *, dynamic: bool) -> Name:
    if isinstance(given, dict) and bool(given.get("is_dynamic")) == dynamic:
        key = (given.get("dtype"), given.get("qscheme"), given.get("group_size"))
        for form, (dtype, scheme, _, group) in known.items():
            if key == (dtype, scheme, group) and (
                scheme != "per_group" or given.get("scale_format") == "e8m0"
            ):
                return form
    raise FourfoldError(
        f"The {what} in quantization_config ({short(str(given))}) are of a kind that Fourfold does not "
        f"read; it reads {', '.join(known)}. Start from the unquantized model."
    )


DIALECT = Quark()
