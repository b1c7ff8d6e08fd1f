"""gpt-oss: fused MXFP4 experts, ``<name>_blocks`` U8 [E, N, K/32, 16] and ``<name>_scales`` U8 [E, N, K/32].

Everything else is plain. A logical expert tensor keeps the stored orientation [E, N, K] with K, the input,
last; transformers transposes it when it expands it. Read only: the other dialects store experts one by one.
Source: the gpt-oss checkpoints and transformers' integration of them.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from fourfold.checkpoint.dialect import VALUE, Entry, Reading, plain_entry, read_only
from fourfold.checkpoint.storage.header import PlannedTensor, StoredTensor, broken, short
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.quantization import KVCacheFormat, LayerScheme, Quantization
from fourfold.formats import BlockTensor

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_BYTES = 16


class GptOss:
    """The dialect ``mxfp4``."""

    name = "mxfp4"
    writable = False

    def claims(self, quantization_config: dict[str, Any] | None) -> bool:
        """By quant_method."""
        return (quantization_config or {}).get("quant_method") == "mxfp4"

    def read(
        self,
        config: dict[str, Any],
        stored: dict[str, StoredTensor],
        load: Callable[[StoredTensor], torch.Tensor],
    ) -> Reading:
        """Pairs of blocks and scales become one tensor under the name without the suffix."""
        entries: dict[str, Entry] = {}
        for name, tensor in stored.items():
            base = name.removesuffix(BLOCKS)
            if name.endswith(BLOCKS) and base + SCALES in stored:
                entries[base] = _entry(base, tensor, stored[base + SCALES])
            elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in stored):
                entries[name] = plain_entry(tensor)
        layers = {n: LayerScheme(weight="mxfp4") for n, e in entries.items() if e.info.format is not None}
        return Reading(Quantization(layers=layers), entries, {})

    def assemble(
        self, entry: Entry, load: Callable[[StoredTensor], torch.Tensor]
    ) -> torch.Tensor | BlockTensor:
        """Read a plain tensor or fused experts."""
        if entry.info.format is None:
            return load(entry.parts[VALUE])
        return BlockTensor("mxfp4", load(entry.parts[BLOCKS]).flatten(-2), load(entry.parts[SCALES]))

    def plan(self, info: TensorInfo) -> list[PlannedTensor]:
        """Refused: read only."""
        raise read_only(self.name)

    def store(self, info: TensorInfo, value: torch.Tensor | BlockTensor) -> list[torch.Tensor]:
        """Refused: read only."""
        raise read_only(self.name)

    def check_kv_cache(self, form: KVCacheFormat) -> None:
        """Refused: read only."""
        raise read_only(self.name)

    def kv_plan(self, module: str, form: KVCacheFormat, count: int) -> PlannedTensor:
        """Refused: read only."""
        raise read_only(self.name)

    def fixed_rotations(self, quantization: Quantization) -> dict[str, tuple[PlannedTensor, torch.Tensor]]:
        """None."""
        return {}

    def says_kept(self, settings: dict[str, Any], module: str) -> bool:
        """Always: what is quantized is told by the tensors' names."""
        return True

    def quantization_config(
        self, quantization: Quantization, kept_linears: Collection[str]
    ) -> dict[str, Any] | None:
        """Refused: read only."""
        raise read_only(self.name)


def _entry(name: str, blocks: StoredTensor, scales: StoredTensor) -> Entry:
    fits = (
        blocks.shape[:-1] == scales.shape and blocks.shape[-1:] == (BLOCK_BYTES,) and len(scales.shape) >= 2
    )
    if not fits or blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise broken(
            blocks.path,
            f"'{short(blocks.name)}' {blocks.dtype} {list(blocks.shape)} and its scales {scales.dtype} "
            f"{list(scales.shape)} are no MXFP4 pair of U8 [..., N, K/32, 16] and U8 [..., N, K/32]",
        )
    *leading, count = list(scales.shape)
    shape = (*leading, count * 2 * BLOCK_BYTES)
    info = TensorInfo(name, shape, None, "mxfp4", blocks.nbytes + scales.nbytes, blocks.path.name)
    return Entry(info, {BLOCKS: blocks, SCALES: scales})


DIALECT = GptOss()
