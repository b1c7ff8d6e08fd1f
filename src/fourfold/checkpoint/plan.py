"""Where every tensor of a checkpoint will lie, planned before the first one is computed.

Everything follows from names, shapes, formats and the dialect: stored tensors, shards, the KV scales that go
with k_proj and v_proj, and the ecosystem's configuration. What cannot be stored is refused here.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fourfold.checkpoint.dialect import Dialect, kept_linears
from fourfold.checkpoint.folder import SINGLE
from fourfold.checkpoint.storage.header import PlannedTensor
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import Quantization

PLAIN = "plain"


@dataclass(frozen=True)
class Shard:
    """One planned file: its place in the order, its name, its logical tensors, and its bytes of tensors."""

    index: int
    file: str
    tensors: tuple[TensorInfo, ...]
    nbytes: int


class CheckpointPlan:
    """What will be stored and where: everything that follows from names, shapes, formats and the dialect.

    ``kv_scales`` holds what is stored beside each cached projection; ``hold_kv_scales`` may replace it.
    """

    def __init__(
        self,
        dialect: Dialect,
        quantization: Quantization,
        tensors: list[TensorInfo],
        max_shard_bytes: int,
        kv_scales: Mapping[str, torch.Tensor],
    ):
        self.dialect, self.tensors = dialect, tensors
        self.stored = {info.name: dialect.plan(info) for info in tensors}
        self.quantization = quantization
        self.hold_kv_scales(kv_scales)
        self.config = dialect.quantization_config(quantization, kept_linears(tensors))
        self.shards = self._split(max_shard_bytes)
        self._check_names()

    def hold_kv_scales(self, kv_scales: Mapping[str, torch.Tensor]) -> None:
        """Store these numbers beside the cached projections."""
        self.kv_scales = dict(kv_scales)
        self.beside = _plan_beside(self.dialect, self.quantization, kv_scales)

    @property
    def written_dialect(self) -> str:
        """The dialect that a reader will find: where nothing is quantized, each writes a plain folder."""
        return self.dialect.name if self.config is not None else PLAIN

    def planned(self, info: TensorInfo) -> list[PlannedTensor]:
        """The stored tensors of ``info``, and what goes beside it."""
        return self.stored[info.name] + [planned for planned, _ in self.beside.get(info.name, ())]

    def digest(self) -> str:
        """Changes whenever the bytes of a shard could, given the same numbers."""
        layout = [
            [
                shard.file,
                [(p.name, str(p.dtype), p.shape) for info in shard.tensors for p in self.planned(info)],
            ]
            for shard in self.shards
        ]
        return hashlib.sha256(json.dumps([layout, self.config], sort_keys=True).encode()).hexdigest()[:16]

    def _split(self, max_shard_bytes: int) -> list[Shard]:
        groups: list[tuple[list[TensorInfo], int]] = [([], 0)]
        for info in self.tensors:
            nbytes = sum(planned.nbytes for planned in self.planned(info))
            members, total = groups[-1]
            if members and total + nbytes > max_shard_bytes:
                members, total = [], 0
                groups.append((members, 0))
            members.append(info)
            groups[-1] = (members, total + nbytes)
        count = len(groups)
        return [
            Shard(i, _shard_name(i, count), tuple(members), total)
            for i, (members, total) in enumerate(groups)
        ]

    def _check_names(self) -> None:
        seen: set[str] = set()
        for info in self.tensors:
            for planned in self.planned(info):
                if planned.name in seen:
                    raise FourfoldError(
                        f"Two tensors would be stored as '{planned.name}' in the dialect "
                        f"{self.dialect.name}. Remove one of them from the source."
                    )
                seen.add(planned.name)


def _shard_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _plan_beside(
    dialect: Dialect, quantization: Quantization, scales: Mapping[str, torch.Tensor]
) -> dict[str, list[tuple[PlannedTensor, torch.Tensor]]]:
    """By the weight that it goes with: what is stored besides tensors of the model, and its numbers.

    That is the KV scale of a k_proj or v_proj, and a rotation that is the same for all.
    """
    beside = {name: [fixed] for name, fixed in dialect.fixed_rotations(quantization).items()}
    form = quantization.kv_cache
    if form is None:
        return beside
    dialect.check_kv_cache(form)
    for module, scale in scales.items():
        planned = dialect.kv_plan(module, form, scale.numel())
        beside.setdefault(f"{module}.weight", []).append((planned, scale.reshape(planned.shape)))
    return beside
