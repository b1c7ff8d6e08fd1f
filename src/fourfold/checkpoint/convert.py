"""From one dialect to another: names and configuration change, numbers do not; streamed, resumable."""

from collections.abc import Callable
from pathlib import Path

from fourfold.checkpoint.checkpoint import Checkpoint
from fourfold.checkpoint.fingerprint import source_fingerprint
from fourfold.checkpoint.rotations import check_shared
from fourfold.checkpoint.sources import open_checkpoint
from fourfold.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, refuse_existing
from fourfold.core.errors import UsageError
from fourfold.core.manifest import Manifest

NO_TOKENIZER = "This folder was written without a tokenizer, because its source had none."


def convert(
    source: str | Path,
    out: Path,
    dialect: str,
    *,
    resume: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[str, int], None] | None = None,
) -> Manifest:
    """Write ``source`` into ``out`` in ``dialect``. ``progress`` gets each tensor's name and bytes after it.

    Notes, recipe, tokenizer and generation settings come along. Raises UsageError when ``dialect`` cannot
    express a tensor (before anything is written), or when nothing in ``source`` is quantized and ``dialect``
    is not plain.
    """
    refuse_existing(out)
    checkpoint = open_checkpoint(source)
    scheme = checkpoint.quantization
    if not scheme.layers and scheme.kv_cache is None and dialect != "plain":
        raise UsageError(
            f"{source} holds nothing quantized, so there is nothing to convert to {dialect}. "
            "Use `fourfold quantize` first."
        )
    check_shared(scheme, checkpoint.load)
    writer = CheckpointWriter(
        out,
        dialect,
        checkpoint.config,
        scheme,
        [checkpoint.info(name) for name in checkpoint.names()],
        fingerprint={"source": source_fingerprint(checkpoint)},
        resume=resume,
        max_shard_bytes=max_shard_bytes,
        kv_scales=checkpoint.kv_scales,
    )
    copy_shards(checkpoint, writer, progress)
    manifest = checkpoint.manifest
    return writer.finish(
        source=str(source),
        recipe=manifest.recipe if manifest else None,
        calibration=manifest.calibration if manifest else None,
        notes=notes_of(checkpoint),
        generation_config=checkpoint.generation_config,
        write_tokenizer=checkpoint.write_tokenizer if checkpoint.has_tokenizer() else None,
    )


def copy_shards(
    checkpoint: Checkpoint, writer: CheckpointWriter, progress: Callable[[str, int], None] | None = None
) -> None:
    """Copy every pending shard, holding one tensor at a time."""
    for shard in writer.pending():
        with writer.shard(shard.index) as file:
            for info in shard.tensors:
                file.write(info.name, checkpoint.load(info.name))
                if progress is not None:
                    progress(info.name, info.nbytes)


def notes_of(checkpoint: Checkpoint) -> list[str]:
    """The source's notes; weights alone may be converted, and the card then says that they are alone."""
    notes = [note for note in checkpoint.notes if note != NO_TOKENIZER]
    return notes if checkpoint.has_tokenizer() else [*notes, NO_TOKENIZER]
