"""What compressed-tensors and Quark share: a quantized module is ``<module>.weight_scale`` and its codes.

Both store per-module tensors beside a configuration of schemes. A subclass brings the table of formats, reads
the configuration into "module -> scheme", names the KV scales, and writes the configuration.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import torch

from fourfold.checkpoint.dialect import (
    VALUE,
    Entry,
    Reading,
    kv_cache_unsaid,
    module_of,
    plain_entry,
)
from fourfold.checkpoint.kv_scales import PER_HEAD
from fourfold.checkpoint.layout import Layout, Load, assemble_blocks, block_entry, plan_blocks, store_blocks
from fourfold.checkpoint.rotations import INPUT_ROTATION, Rotations, add_rotations
from fourfold.checkpoint.storage.header import PlannedTensor, StoredTensor, short
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import KVCacheFormat, LayerScheme, Quantization
from fourfold.formats import BlockTensor

SCALE = "weight_scale"
# the key for what an ecosystem's configuration has no place for; their readers ignore it
OWN_KEY = "fourfold"
FOREIGN = (".weight_zero_point", ".input_scale", ".input_global_scale", ".weight_g_idx", ".weight_scale_2")

SchemeOf = Callable[[str], LayerScheme]


class BlockDialect(ABC):
    """A dialect whose quantized weights are several tensors of one module."""

    name: ClassVar[str]
    method: ClassVar[str]
    writable: ClassVar[bool] = True
    layouts: ClassVar[Mapping[str, Layout]]
    kv_projections: ClassVar[Mapping[str, str]]
    kv_shapes: ClassVar[Mapping[KVCacheFormat, Callable[[int], tuple[int, ...]]]]
    rotation_times: ClassVar[float] = 1.0  # a trained rotation is stored times this

    def claims(self, quantization_config: dict[str, Any] | None) -> bool:
        """By quant_method."""
        return (quantization_config or {}).get("quant_method") == self.method

    def read(self, config: dict[str, Any], stored: dict[str, StoredTensor], load: Load) -> Reading:
        """A module with a weight_scale is quantized as the configuration says; all else is plain."""
        settings = config["quantization_config"]
        scheme_of, kv_cache = self.read_config(settings)
        rotations = self.read_rotations(settings)
        layers: dict[str, LayerScheme] = {}
        entries: dict[str, Entry] = {}
        kv_scales: dict[str, torch.Tensor] = {}
        matrices: dict[str, StoredTensor] = {}
        used: set[str] = set()
        for name, tensor in stored.items():
            module, _, suffix = name.rpartition(".")
            if (owner := self._kv_owner(name)) is not None:
                kv_scales[owner] = _kv_scale(tensor, load, kv_cache)
            elif (key := rotations.owner(name)) is not None:
                matrices[key] = tensor
            elif suffix != SCALE and name not in used:
                is_quantized = f"{module}.{SCALE}" in stored
                scheme = scheme_of(module) if is_quantized and module not in layers else None
                if scheme is None or suffix not in self.layouts[scheme.weight].suffixes:
                    # beside a quantized weight: a bias, or what _refuse_foreign will complain of
                    entries[name] = plain_entry(tensor)
                    continue
                layers[module] = scheme
                entry = block_entry(module, scheme, self.layouts[scheme.weight], stored)
                entries[f"{module}.weight"] = entry
                used.update(part.name for part in entry.parts.values())
        _refuse_foreign(stored, entries, used)
        add_rotations(layers, entries, rotations, matrices, load)
        return Reading(Quantization(layers=layers, kv_cache=kv_cache), entries, kv_scales)

    def assemble(self, entry: Entry, load: Load) -> torch.Tensor | BlockTensor:
        """Read a plain tensor or a quantized weight."""
        if entry.info.name.endswith(INPUT_ROTATION):
            return (load(entry.parts[VALUE]) / self.rotation_times).float()
        if entry.info.format is None:
            return load(entry.parts[VALUE])
        return assemble_blocks(entry, self.layouts[entry.info.format], load)

    def plan(self, info: TensorInfo) -> list[PlannedTensor]:
        """What is stored for ``info``.

        Raises UsageError for a format, or a name, that cannot be expressed.
        """
        if info.name.endswith(INPUT_ROTATION):
            return [self.plan_rotation(info.name.removesuffix(INPUT_ROTATION))]
        if info.format is None:
            assert info.dtype is not None
            return [PlannedTensor(info.name, info.dtype, info.shape)]
        if not info.name.endswith(".weight"):
            raise UsageError(
                f"{info.name} is no '<module>.weight', which is all that {self.name} can store quantized. "
                "Split fused experts into one weight each, or keep this tensor."
            )
        self.known(self.layouts, info.format, info.name, "weights")
        return plan_blocks(info, module_of(info.name), self.layouts[info.format])

    def store(self, info: TensorInfo, value: torch.Tensor | BlockTensor) -> list[torch.Tensor]:
        """The tensors of the plan."""
        if isinstance(value, torch.Tensor) and info.name.endswith(INPUT_ROTATION):
            return [(value * self.rotation_times).to(self.plan(info)[0].dtype)]
        if isinstance(value, torch.Tensor):
            return [value]
        return store_blocks(value, self.layouts[value.format], self.plan(info))

    def check_kv_cache(self, form: KVCacheFormat) -> None:
        """By the table of shapes."""
        if form not in self.kv_shapes:
            raise kv_cache_unsaid(self.name, form, self.kv_shapes)

    def kv_plan(self, module: str, form: KVCacheFormat, count: int) -> PlannedTensor:
        """The stored scales of a k_proj or v_proj."""
        shape = self.kv_shapes[form](count)
        for projection, suffix in self.kv_projections.items():
            if module.endswith(projection):
                return PlannedTensor(module.removesuffix(projection) + suffix, torch.float32, shape)
        raise FourfoldError(f"{module} is neither a k_proj nor a v_proj and has no KV scale.")

    def known(self, table: Mapping[str, Any], form: str, layer: str, what: str) -> None:
        """Raise UsageError when ``form`` is none of the formats in ``table``."""
        if form not in table:
            raise UsageError(
                f"{layer}: the dialect {self.name} cannot express {what} in {form}; it can in "
                f"{', '.join(table)}. Choose one of these in the recipe, or another --dialect."
            )

    @abstractmethod
    def read_config(self, settings: dict[str, Any]) -> tuple[SchemeOf, KVCacheFormat | None]:
        """From a quantization_config: what gives a module its scheme, and the KV cache's format."""

    @abstractmethod
    def read_rotations(self, settings: dict[str, Any]) -> Rotations:
        """From a quantization_config: which inputs are turned, and which stored tensors are matrices."""

    @abstractmethod
    def plan_rotation(self, module: str) -> PlannedTensor:
        """The stored tensor of the trained rotation of ``module``."""

    @abstractmethod
    def fixed_rotations(self, quantization: Quantization) -> dict[str, tuple[PlannedTensor, torch.Tensor]]:
        """By weight: the rotation that is stored beside it although it is the same for every model."""

    @abstractmethod
    def says_kept(self, settings: dict[str, Any], module: str) -> bool:
        """Whether ``settings`` leave ``module`` unquantized."""

    @abstractmethod
    def quantization_config(
        self, quantization: Quantization, kept_linears: Collection[str]
    ) -> dict[str, Any] | None:
        """The ecosystem's configuration, or None when nothing is quantized."""

    def _kv_owner(self, name: str) -> str | None:
        for projection, suffix in self.kv_projections.items():
            if name.endswith(suffix):
                return name.removesuffix(suffix) + projection
        return None


def by_scheme(quantization: Quantization) -> dict[LayerScheme, list[str]]:
    """Modules by scheme, the most common scheme first."""
    groups: dict[LayerScheme, list[str]] = {}
    for module, scheme in quantization.layers.items():
        groups.setdefault(scheme, []).append(module)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def damaged(what: str) -> FourfoldError:
    """The error for a quantization_config that cannot be understood."""
    return FourfoldError(
        f"quantization_config in config.json {what}. Copy config.json from the model's origin."
    )


def objects(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under ``key``, empty when there is none. Raises FourfoldError when it is something else."""
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise damaged(f"has a '{key}' that is no object")
    return value or {}


def texts(settings: dict[str, Any], key: str) -> list[str]:
    """The list of texts under ``key``, empty when there is none. Raises FourfoldError for something else."""
    value = settings.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise damaged(f"has a '{key}' that is no list of names")
    return value or []


def _kv_scale(tensor: StoredTensor, load: Load, form: KVCacheFormat | None) -> torch.Tensor:
    count = tensor.nbytes // tensor.dtype.itemsize
    is_run = count == max(tensor.shape, default=1)
    if not tensor.dtype.is_floating_point or not is_run or (count != 1 and form != PER_HEAD):
        raise FourfoldError(
            f"The KV scale '{short(tensor.name)}' in {tensor.path} has the shape {list(tensor.shape)}, but "
            "Fourfold reads one number for a whole cache, or one for each key head where config.json says "
            "so. Start from the unquantized model."
        )
    return load(tensor).float().reshape(-1)


def _refuse_foreign(stored: dict[str, StoredTensor], entries: dict[str, Entry], used: set[str]) -> None:
    """What looks like part of a scheme must have been used by one; all else is a tensor of the model."""
    for name, tensor in stored.items():
        if name in used:
            continue
        if name.endswith(FOREIGN):
            raise FourfoldError(
                f"'{short(name)}' in {tensor.path} belongs to a scheme that Fourfold does not read (zero "
                "points, static activations, reordered columns, two-level scales). Start from the "
                "unquantized model."
            )
        if name.endswith((".weight_packed", f".{SCALE}")):
            raise FourfoldError(
                f"'{short(name)}' in {tensor.path} is part of a quantized weight whose other parts are not "
                "there. The folder is incomplete: fetch it again."
            )
