"""Finished layers on disk, so that a night's work survives whatever ends it.

A layer is one safetensors file in ``OUT.partial/layers`` and a JSON beside it, written last, that holds the
file's hash, the formats of its tensors and what there is to note. A layer without its JSON is made again.
"""

import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from fourfold.checkpoint.storage.header import PlannedTensor, read_header
from fourfold.checkpoint.storage.reader import read_tensor
from fourfold.checkpoint.storage.writer import SafetensorsWriter
from fourfold.compress.calibrated.routing import ExpertTokens
from fourfold.compress.model import Value
from fourfold.core.durable import sha256_of, sync_folder, write_file, writing
from fourfold.core.errors import FourfoldError
from fourfold.core.records import Record
from fourfold.formats import BlockTensor

FOLDER = "layers"
BLOCKS, SCALES, GLOBAL_SCALE = ".blocks", ".scales", ".global_scale"


class Held(Record):
    """How a tensor of a finished layer is held; ``format`` None: as it is."""

    format: str | None = None
    scale_rule: str | None = None


class FinishedLayer(Record):
    """What the JSON of a finished layer says."""

    sha256: str
    tensors: dict[str, Held]
    notes: list[str] = []
    experts: list[ExpertTokens] = []


class LayerStore:
    """The finished parts of a calibrated run by key: ``layer-00003``, or the name of a pass that learned."""

    def __init__(self, work: Path):
        self.folder = work / FOLDER
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            sync_folder(work)

    def find(self, key: str) -> FinishedLayer | None:
        """The finished part ``key``, or None when it is not there or not whole."""
        data, record = self._paths(key)
        if not (data.is_file() and record.is_file()):
            return None
        try:
            finished = FinishedLayer.model_validate_json(record.read_text())
        except ValidationError:
            return None
        return finished if sha256_of(data) == finished.sha256 else None

    def save(
        self,
        key: str,
        values: Mapping[str, Value],
        notes: list[str],
        experts: Sequence[ExpertTokens] = (),
    ) -> FinishedLayer:
        """Make ``values`` durable as ``key``. Raises FourfoldError when the disk is full."""
        data, record = self._paths(key)
        parts = {name: tensor for value in values.items() for name, tensor in _parts(*value).items()}
        planned = [PlannedTensor(n, t.dtype, tuple(t.shape)) for n, t in parts.items()]
        digests: list[str] = []
        with SafetensorsWriter(data, planned, digests.append) as file:
            for name, tensor in parts.items():
                file.write(name, tensor)
        held = {
            name: Held(format=value.format, scale_rule=value.scale_rule)
            if isinstance(value, BlockTensor)
            else Held()
            for name, value in values.items()
        }
        finished = FinishedLayer(sha256=digests[0], tensors=held, notes=notes, experts=list(experts))
        with writing(record):
            write_file(record, finished.model_dump_json(indent=1))
        return finished

    def load(self, key: str, name: str, held: Held) -> Value:
        """The tensor ``name`` of the part ``key``."""
        return self._load(read_header(self._paths(key)[0]), name, held)

    def load_all(self, key: str, finished: FinishedLayer, left_out: Container[str] = ()) -> dict[str, Value]:
        """Every tensor of the part ``key`` but those ``left_out``."""
        header = read_header(self._paths(key)[0])
        wanted = {name: held for name, held in finished.tensors.items() if name not in left_out}
        return {name: self._load(header, name, held) for name, held in wanted.items()}

    def discard(self, key: str) -> None:
        """Take the part ``key`` away."""
        for path in self._paths(key):
            with writing(path):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Take the store away, once the shards hold everything."""
        with writing(self.folder):
            shutil.rmtree(self.folder)
            sync_folder(self.folder.parent)

    def _load(self, header: Mapping[str, object], name: str, held: Held) -> Value:
        def part(suffix: str) -> torch.Tensor:
            stored = header.get(name + suffix)
            if stored is None:
                raise FourfoldError(
                    f"{self.folder} lacks '{name}{suffix}'. Delete that folder and start anew."
                )
            return read_tensor(stored)  # pyright: ignore[reportArgumentType]

        if held.format is None:
            return part("")
        whole = part(GLOBAL_SCALE) if name + GLOBAL_SCALE in header else None
        return BlockTensor(held.format, part(BLOCKS), part(SCALES), held.scale_rule, whole)

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.safetensors", self.folder / f"{key}.json"


def _parts(name: str, value: Value) -> dict[str, torch.Tensor]:
    if not isinstance(value, BlockTensor):
        return {name: value}
    parts = {name + BLOCKS: value.blocks, name + SCALES: value.scales}
    if value.global_scale is not None:
        parts[name + GLOBAL_SCALE] = value.global_scale
    return parts
