"""CheckpointWriter: a sharded checkpoint written tensor by tensor, durable shard by shard, resumable.

Work happens in ``OUT.partial``. Which tensor goes into which shard, and every byte offset, is planned from
names, shapes and formats before the first tensor is computed; a journal lists the shards that are on disk. A
run that was killed continues with ``resume`` and gives the same bytes as one that was not. At the end the
folder is opened as a reader would, and every tensor and its scheme compared with what was in memory; only the
last step, after the manifest with every file's hash, gives the folder its name ``OUT``.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fourfold import __version__
from fourfold.checkpoint.card import make_card
from fourfold.checkpoint.checkpoint import Checkpoint
from fourfold.checkpoint.dialect import get_writable
from fourfold.checkpoint.digests import DIGESTS_NAME, TensorDigests, differing, digest
from fourfold.checkpoint.folder import CONFIG, GENERATION_CONFIG, INDEX
from fourfold.checkpoint.input_feedback import KEY as FEEDBACK
from fourfold.checkpoint.input_feedback import feedback_config
from fourfold.checkpoint.journal import Journal
from fourfold.checkpoint.kv_scales import calibrated_scales, unit_scales
from fourfold.checkpoint.plan import CheckpointPlan, Shard
from fourfold.checkpoint.sources import open_folder
from fourfold.checkpoint.storage.writer import SafetensorsWriter
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.durable import sha256_of, sync_file, sync_folder, write_file, writing
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.manifest import MANIFEST_NAME, Manifest, read_manifest
from fourfold.core.quantization import Quantization
from fourfold.core.records import ModelCard
from fourfold.formats import BlockTensor

DEFAULT_SHARD_BYTES = 2_000_000_000


class ShardWriter:
    """Writes the tensors of one shard; each logical tensor becomes the dialect's stored ones.

    ``digests`` gets the digest of each.
    """

    def __init__(self, file: SafetensorsWriter, plan: CheckpointPlan, shard: Shard, digests: dict[str, str]):
        self._file, self._plan, self._digests = file, plan, digests
        self._infos = {info.name: info for info in shard.tensors}

    def write(self, name: str, value: torch.Tensor | BlockTensor) -> None:
        """Store one tensor. Raises FourfoldError when it is not what was planned for this shard."""
        info = self._infos.get(name)
        if info is None:
            raise FourfoldError(f"Tensor '{name}' is not planned for the shard {self._file.path.name}.")
        _check_value(info, value)
        self._digests[name] = digest(value)
        stored = self._plan.stored[name]
        for planned, tensor in zip(stored, self._plan.dialect.store(info, value), strict=True):
            self._file.write(planned.name, tensor)
        for planned, numbers in self._plan.beside.get(name, ()):
            self._file.write(planned.name, numbers)


class CheckpointWriter:
    """Writes ``out``. Shards are written in any order, each whole; ``finish`` makes the folder appear.

    ``tensors`` plans every logical tensor in order. ``fingerprint`` says what the numbers depend on (source,
    recipe, …); a resumed run must bring the same. ``kv_scales`` maps k_proj and v_proj to calibrated FP8
    scales, [1] or [key heads]; ``fp8`` stores 1.0 where it says nothing. With ``kv_scales_follow`` they are
    not known yet, and ``hold_kv_scales`` brings them before the first shard. Raises UsageError for an
    existing ``out``, an interrupted run without ``resume``, a fingerprint that differs, or a format that the
    dialect cannot express.
    """

    def __init__(
        self,
        out: Path,
        dialect: str,
        config: dict[str, Any],
        quantization: Quantization,
        tensors: list[TensorInfo],
        *,
        fingerprint: dict[str, str],
        resume: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        kv_scales: Mapping[str, torch.Tensor] | None = None,
        kv_scales_follow: bool = False,
    ):
        refuse_existing(out)
        self.out, self.work = out, partial_folder(out)
        self.config, self.quantization = config, quantization
        chosen = get_writable(dialect)
        if quantization.kv_cache is not None:
            chosen.check_kv_cache(quantization.kv_cache)
        self._awaits_kv_scales = kv_scales_follow
        scales = unit_scales(quantization.kv_cache, tensors, config)
        self.plan = CheckpointPlan(chosen, quantization, tensors, max_shard_bytes, scales)
        if not kv_scales_follow:
            self.hold_kv_scales(kv_scales or {})
        self.fingerprint = fingerprint | {
            "dialect": dialect,
            "layout": self.plan.digest(),
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        }
        self._journal = Journal(self.work, self.fingerprint, resume)

    def hold_kv_scales(self, kv_scales: Mapping[str, torch.Tensor]) -> None:
        """Store these scales. Raises UsageError when ``fp8-head`` lacks one, FourfoldError for a bad one."""
        form = self.quantization.kv_cache
        self.plan.hold_kv_scales(calibrated_scales(form, self.plan.tensors, self.config, kv_scales))
        self._awaits_kv_scales = False

    @property
    def shards(self) -> list[Shard]:
        """Every planned shard in order."""
        return self.plan.shards

    def pending(self) -> list[Shard]:
        """The shards that are not durable yet."""
        done = self._journal.done()
        return [shard for shard in self.shards if shard.file not in done]

    @contextmanager
    def shard(self, index: int) -> Iterator[ShardWriter]:
        """Write one shard: every tensor of ``shards[index].tensors``, preferably in that order.

        The shard counts as written when the block ends without an exception. Raises FourfoldError when the
        disk is full, or a tensor is missing or not as planned; finished shards stay.
        """
        assert not self._awaits_kv_scales, "hold_kv_scales comes before the first shard"
        shard = self.shards[index]
        planned = [stored for info in shard.tensors for stored in self.plan.planned(info)]
        path = self.work / shard.file
        digests: dict[str, str] = {}
        with SafetensorsWriter(path, planned, lambda h: self._journal.add(shard.file, h, digests)) as file:
            yield ShardWriter(file, self.plan, shard, digests)

    def finish(
        self,
        *,
        source: str,
        recipe: dict[str, Any] | None = None,
        calibration: dict[str, Any] | None = None,
        card: ModelCard | None = None,
        notes: Iterable[str] = (),
        generation_config: dict[str, Any] | None = None,
        write_tokenizer: Callable[[Path], object] | None = None,
        tidy: Callable[[], None] | None = None,
    ) -> Manifest:
        """Write all that is not a shard, then give the folder its name. Returns the manifest.

        ``card`` defaults to what the plan says, with ``notes``. ``write_tokenizer``
        (``Checkpoint.write_tokenizer``) puts the tokenizer's files into the folder it is given. ``tidy``
        takes away what else lies in ``work``, once nothing of it is needed any more. Raises FourfoldError
        when a tensor that is read back is not the one that was written.
        """
        if pending := self.pending():
            raise FourfoldError(f"{self.work} still lacks {len(pending)} shards, first {pending[0].file}.")
        self._write_config(generation_config or {})
        if write_tokenizer is not None:
            with writing(self.work):
                write_tokenizer(self.work)
        card = card or make_card(
            self.out.name, self.config, self.stored_infos(), self.quantization, list(notes)
        )
        self._write_json(DIGESTS_NAME, TensorDigests(files=self._journal.digests()).model_dump())
        self._check_written()
        manifest = self._write_manifest(source, recipe, calibration, card)
        if tidy is not None:
            tidy()
        with writing(self.out):
            self._journal.remove()
            sync_folder(self.work)
            self._journal.close()
            self.work.rename(self.out)
            sync_folder(self.out.parent)
        return manifest

    def interrupted_manifest(self) -> Manifest | None:
        """The manifest of a run that was killed after writing it; None while there is a shard to write."""
        return None if self.pending() else read_manifest(self.work)

    def stored_infos(self) -> list[TensorInfo]:
        """The planned tensors with the bytes they take in this dialect."""
        return [
            TensorInfo(
                info.name,
                info.shape,
                info.dtype,
                info.format,
                sum(p.nbytes for p in self.plan.stored[info.name]),
            )
            for info in self.plan.tensors
        ]

    def _check_written(self) -> None:
        """Read every tensor back and compare; the shards of those that differ are to be written again."""
        files = self._journal.digests()
        expected = {name: found for names in files.values() for name, found in names.items()}
        written = open_folder(self.work)
        wrong = list(differing(written, expected))
        if not wrong:
            self._check_scheme(written)
            return
        for file in [file for file, names in files.items() if not names.keys().isdisjoint(wrong)]:
            self._journal.drop(file)
        raise FourfoldError(
            f"{len(wrong)} tensors of {self.work} are not what was in memory when they are read back, first "
            f"{wrong[0]}. Either the disk fails, or the dialect {self.plan.dialect.name} stores something "
            "wrongly. Run the same command with --resume, which writes these shards again; if that does not "
            "help, report it as a bug of Fourfold."
        )

    def _check_scheme(self, written: Checkpoint) -> None:
        """What readers take the tensors for: how each layer is held and computed, and the KV cache."""
        made, found = self.quantization, written.quantization
        changed = [m for m in made.layers | found.layers if made.layers.get(m) != found.layers.get(m)]
        scales = self.plan.kv_scales
        changed += [
            m for m in scales | written.kv_scales if not _same(scales.get(m), written.kv_scales.get(m))
        ]
        if changed or made.kv_cache != found.kv_cache:
            raise FourfoldError(
                f"The tensors of {self.work} are read back as they were in memory, but the scheme of "
                f"{changed[0] if changed else 'the KV cache'} is not: the dialect {self.plan.dialect.name} "
                "says something else. Report it as a bug of Fourfold, with the recipe; another --dialect may "
                "do."
            )

    def _write_config(self, generation_config: dict[str, Any]) -> None:
        config = dict(self.config)
        if self.plan.config is not None:
            config["quantization_config"] = self.plan.config
        if feedback := feedback_config(self.quantization):
            config[FEEDBACK] = feedback
        self._write_json(CONFIG, config)
        if generation_config:
            self._write_json(GENERATION_CONFIG, generation_config)
        if len(self.shards) > 1:
            self._write_json(INDEX, self._index())

    def _write_json(self, name: str, value: object) -> None:
        with writing(self.work / name):
            write_file(self.work / name, to_json(value))

    def _index(self) -> dict[str, Any]:
        files = {
            p.name: shard.file for shard in self.shards for i in shard.tensors for p in self.plan.planned(i)
        }
        return {"metadata": {"total_size": sum(shard.nbytes for shard in self.shards)}, "weight_map": files}

    def _write_manifest(
        self,
        source: str,
        recipe: dict[str, Any] | None,
        calibration: dict[str, Any] | None,
        card: ModelCard,
    ) -> Manifest:
        hashes = self._journal.done()
        # a run that was killed here leaves its own manifest, or a file that never got its name
        skipped = {*hashes, *self._journal.own_files(), MANIFEST_NAME}
        for path in sorted(self.work.iterdir()):
            if path.is_file() and path.name not in skipped and path.suffix != ".tmp":
                with writing(path):
                    sync_file(path)  # the tokenizer's libraries leave that to chance
                    hashes[path.name] = sha256_of(path)
        manifest = Manifest(
            fourfold_version=__version__,
            source=source,
            dialect=self.plan.written_dialect,
            recipe=recipe,
            calibration=calibration,
            fingerprint=self.fingerprint,
            card=card,
            sha256=dict(sorted(hashes.items())),
        )
        self._write_json(MANIFEST_NAME, manifest.model_dump())
        return manifest


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


def partial_folder(out: Path) -> Path:
    """Where ``out`` is made until it is whole."""
    return out.with_name(out.name + ".partial")


def refuse_existing(out: Path) -> None:
    """Raise UsageError when ``out`` is there already."""
    with writing(out):
        exists = out.exists() or out.is_symlink()
    if exists:
        raise UsageError(f"{out} exists already. Name another output, or remove it first.")


def to_json(value: object) -> str:
    """JSON as it is put on disk: indented, sorted, so that equal content means equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _check_value(info: TensorInfo, value: torch.Tensor | BlockTensor) -> None:
    given = value.format if isinstance(value, BlockTensor) else None
    if given != info.format or tuple(value.shape) != info.shape:
        raise FourfoldError(
            f"Tensor '{info.name}' was planned as {info.format or info.dtype} {list(info.shape)}, but came "
            f"as {given or getattr(value, 'dtype', None)} {list(value.shape)}."
        )
