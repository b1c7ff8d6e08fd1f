"""What a dialect is: the mapping between logical tensors and what one ecosystem stores and says.

Inside Fourfold a quantized tensor is one BlockTensor under its parameter's name; on disk it is two to four
tensors with the dialect's names and dtypes. A dialect never changes a number: it renames, reinterprets bytes,
and writes or reads ``quantization_config``.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fourfold.checkpoint.storage.header import PlannedTensor, StoredTensor
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.errors import UsageError
from fourfold.core.quantization import KVCacheFormat, Quantization
from fourfold.core.registry import Registry
from fourfold.formats import BlockTensor

EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|relative_attention_bias)\.weight$")
TOWER = re.compile(r"(^|_)(vision|visual|audio|image|speech)(_|$)|^vit$")  # a part of a module's name
OUTPUT_HEAD = "lm_head"
EXPERTS = ".experts"
VALUE = "value"  # the only part of a tensor that is held as it is

DIALECTS = Registry("fourfold.checkpoint.dialects", "DIALECT", "dialect")


@dataclass(frozen=True)
class Entry:
    """A logical tensor and the stored tensors it is made of, by part ("value", or "blocks", "scales", …)."""

    info: TensorInfo
    parts: dict[str, StoredTensor]
    scale_rule: str | None = None


@dataclass(frozen=True)
class Reading:
    """What a dialect understood of a folder: its scheme, its tensors, and the FP8 KV scales by module.

    A KV scale is float32 [1], or [key heads] where the scheme says ``fp8-head``.
    """

    quantization: Quantization
    entries: dict[str, Entry]
    kv_scales: dict[str, torch.Tensor]


class Dialect(Protocol):
    """One ecosystem's way of storing quantized tensors; ``DIALECT`` of a module in checkpoint/dialects."""

    name: str
    writable: bool

    def claims(self, quantization_config: dict[str, Any] | None) -> bool:
        """Whether a config.json with this quantization_config (None: it has none) is this dialect's."""
        ...

    def read(
        self,
        config: dict[str, Any],
        stored: dict[str, StoredTensor],
        load: Callable[[StoredTensor], torch.Tensor],
    ) -> Reading:
        """Group the stored tensors into logical ones.

        Raises FourfoldError when config and tensors disagree.
        """
        ...

    def assemble(
        self, entry: Entry, load: Callable[[StoredTensor], torch.Tensor]
    ) -> torch.Tensor | BlockTensor:
        """Read one logical tensor."""
        ...

    def plan(self, info: TensorInfo) -> list[PlannedTensor]:
        """What will be stored for ``info``.

        Raises UsageError for a format that the dialect cannot express.
        """
        ...

    def store(self, info: TensorInfo, value: torch.Tensor | BlockTensor) -> list[torch.Tensor]:
        """The tensors of :meth:`plan`, in its order."""
        ...

    def check_kv_cache(self, form: KVCacheFormat) -> None:
        """Raise UsageError when the dialect cannot say that the KV cache is held in ``form``."""
        ...

    def kv_plan(self, module: str, form: KVCacheFormat, count: int) -> PlannedTensor:
        """The stored tensor of the ``count`` scales of a k_proj or v_proj ``module``."""
        ...

    def fixed_rotations(self, quantization: Quantization) -> dict[str, tuple[PlannedTensor, torch.Tensor]]:
        """By weight: the rotation that is stored beside it although it is the same for every model."""
        ...

    def says_kept(self, settings: dict[str, Any], module: str) -> bool:
        """Whether the quantization_config ``settings`` tells its readers that ``module`` is not quantized."""
        ...

    def quantization_config(
        self, quantization: Quantization, kept_linears: Collection[str]
    ) -> dict[str, Any] | None:
        """The ecosystem's configuration, or None when nothing is quantized."""
        ...


def dialect_names(writable: bool = False) -> list[str]:
    """Names of all dialects, or of those that can be written."""
    return [name for name in DIALECTS.names() if not writable or get_dialect(name).writable]


def get_dialect(name: str) -> Dialect:
    """The dialect ``name``. Raises UsageError that lists the known ones."""
    return DIALECTS.get(name)


def get_writable(name: str) -> Dialect:
    """The dialect ``name``. Raises UsageError when there is none, or it cannot be written."""
    dialect = get_dialect(name)
    if not dialect.writable:
        raise read_only(name)
    return dialect


def read_only(name: str) -> UsageError:
    """The error for writing in a dialect that is only read."""
    return UsageError(f"The dialect {name} is read only. Write compressed-tensors or quark.")


def kv_cache_unsaid(dialect: str, form: KVCacheFormat, known: Collection[str]) -> UsageError:
    """The error for a KV cache format that ``dialect``, which can say ``known``, has no words for."""
    if form.startswith("mx"):
        remedy = (
            "It needs no calibration and nothing in a checkpoint: leave kv_cache out of the recipe, and "
            f"choose it when the model runs, with --kv-cache {form}."
        )
    elif known:
        remedy = f"Choose a recipe with kv_cache: {' or '.join(known)}, or --dialect compressed-tensors."
    else:
        remedy = "Choose --dialect compressed-tensors or quark, or a recipe without kv_cache."
    return UsageError(f"The dialect {dialect} cannot say that the KV cache is {form}. {remedy}")


def plain_entry(stored: StoredTensor) -> Entry:
    """A tensor held as it is."""
    info = TensorInfo(stored.name, stored.shape, stored.dtype, None, stored.nbytes, stored.path.name)
    return Entry(info, {VALUE: stored})


def kept_linears(infos: Iterable[TensorInfo]) -> list[str]:
    """Modules with a plain 2-D weight that is no embedding, and plain fused experts: what to tell to leave.

    A tied lm_head has no tensor of its own, but is a module all the same, so it is always considered. Fused
    experts (3-D, ``….experts.gate_up_proj``) are one module, ``….experts``, unless some of them are cut apart
    and quantized.
    """
    infos = list(infos)
    quantized = {module_of(info.name) for info in infos if info.format is not None}
    kept = {
        module_of(info.name)
        for info in infos
        if info.format is None
        and len(info.shape) == 2
        and info.name.endswith(".weight")
        and not EMBEDDING.search(info.name)
    }
    fused = {
        info.name.rpartition(EXPERTS + ".")[0] + EXPERTS
        for info in infos
        if info.format is None and len(info.shape) == 3 and f"{EXPERTS}." in info.name
    }
    fused -= {module.rpartition(EXPERTS + ".")[0] + EXPERTS for module in quantized}
    return sorted((kept | fused | {OUTPUT_HEAD}) - quantized)


def module_of(name: str) -> str:
    """The module that a parameter belongs to, as Quantization names it."""
    return name.removesuffix(".weight")
