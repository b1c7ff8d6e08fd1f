"""No quantization: every tensor is stored under its own name in its own dtype."""

from collections.abc import Callable, Collection
from typing import Any

import torch

from fourfold.checkpoint.dialect import VALUE, Entry, Reading, kv_cache_unsaid, plain_entry
from fourfold.checkpoint.storage.header import PlannedTensor, StoredTensor
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.errors import UsageError
from fourfold.core.quantization import KVCacheFormat, Quantization
from fourfold.formats import BlockTensor


class Plain:
    """A folder without quantization_config."""

    name = "plain"
    writable = True

    def claims(self, quantization_config: dict[str, Any] | None) -> bool:
        """Plain is what says nothing of quantization."""
        return quantization_config is None

    def read(
        self,
        config: dict[str, Any],
        stored: dict[str, StoredTensor],
        load: Callable[[StoredTensor], torch.Tensor],
    ) -> Reading:
        """Every stored tensor is a logical one."""
        return Reading(Quantization(), {name: plain_entry(tensor) for name, tensor in stored.items()}, {})

    def assemble(
        self, entry: Entry, load: Callable[[StoredTensor], torch.Tensor]
    ) -> torch.Tensor | BlockTensor:
        """The stored tensor."""
        return load(entry.parts[VALUE])

    def plan(self, info: TensorInfo) -> list[PlannedTensor]:
        """The tensor itself; a quantized one is refused."""
        if info.format is not None or info.dtype is None:
            raise UsageError(
                f"{info.name} is held in {info.format}, which the dialect 'plain' cannot express. "
                "Choose --dialect compressed-tensors or quark, or the recipe bf16."
            )
        return [PlannedTensor(info.name, info.dtype, info.shape)]

    def store(self, info: TensorInfo, value: torch.Tensor | BlockTensor) -> list[torch.Tensor]:
        """The tensor itself."""
        assert isinstance(value, torch.Tensor)
        return [value]

    def check_kv_cache(self, form: KVCacheFormat) -> None:
        """A plain folder has no place for a KV format."""
        raise kv_cache_unsaid(self.name, form, ())

    def kv_plan(self, module: str, form: KVCacheFormat, count: int) -> PlannedTensor:
        """There is none."""
        raise kv_cache_unsaid(self.name, form, ())

    def fixed_rotations(self, quantization: Quantization) -> dict[str, tuple[PlannedTensor, torch.Tensor]]:
        """None."""
        return {}

    def says_kept(self, settings: dict[str, Any], module: str) -> bool:
        """Always."""
        return True

    def quantization_config(
        self, quantization: Quantization, kept_linears: Collection[str]
    ) -> dict[str, Any] | None:
        """None."""
        return None


DIALECT = Plain()
