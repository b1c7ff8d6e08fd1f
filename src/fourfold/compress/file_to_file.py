"""Quantization from file to file: open, decide, and stream every tensor through the passes to its shard."""

from collections.abc import Callable
from pathlib import Path

from fourfold import __version__
from fourfold.checkpoint import Checkpoint, CheckpointWriter
from fourfold.checkpoint.fingerprint import short_hash, source_fingerprint
from fourfold.checkpoint.writer import DEFAULT_SHARD_BYTES
from fourfold.compress.model import Model
from fourfold.compress.pipeline import check_recipe, run_passes
from fourfold.compress.recipe import Recipe, load_recipe
from fourfold.compress.resolve import open_source, resolve
from fourfold.compress.stream import stream
from fourfold.core.manifest import Manifest

DEFAULT_DIALECT = "compressed-tensors"

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done_bytes, total_bytes, name)`` after each tensor; bytes are those of the output."""


def quantize(
    source: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe = "mxfp4",
    dialect: str = DEFAULT_DIALECT,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Manifest:
    """Make the checkpoint ``out`` from ``source`` (a folder, a GGUF file, a hub name) by ``recipe``.

    Returns the manifest that was written. Raises UsageError for a call or recipe that makes no sense and for
    an existing ``out``, FourfoldError for a source that cannot be read or rounded; both before anything is
    written, save for NaN and Inf weights, which are found when they are read.
    """
    recipe = load_recipe(recipe)
    check_recipe(recipe)
    checkpoint = open_source(source)
    model = run_passes(recipe, resolve(checkpoint, recipe).model)
    writer = CheckpointWriter(
        Path(out),
        dialect,
        checkpoint.config,
        model.quantization,
        model.infos(),
        fingerprint=fingerprint(checkpoint, recipe),
        resume=resume,
        max_shard_bytes=max_shard_bytes,
    )
    write_shards(writer, model, progress)
    return writer.finish(
        source=str(source),
        recipe=recipe.model_dump(),
        notes=checkpoint.notes,
        generation_config=checkpoint.generation_config,
        write_tokenizer=checkpoint.write_tokenizer,
    )


def write_shards(writer: CheckpointWriter, model: Model, progress: Progress | None = None) -> None:
    """Compute and write every shard that is not durable yet."""
    total = sum(shard.nbytes for shard in writer.shards)
    pending = writer.pending()
    done = total - sum(shard.nbytes for shard in pending)
    for shard in pending:
        with writer.shard(shard.index) as target:
            for name, value in stream(model, [info.name for info in shard.tensors]):
                target.write(name, value)
                done += value.nbytes
                del value  # or it would live until the next one is ready
                if progress is not None:
                    progress(done, total, name)


def fingerprint(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, str]:
    """What the numbers of an output depend on; the writer adds the dialect and the layout."""
    return {
        "source": source_fingerprint(checkpoint),
        "recipe": short_hash(recipe.model_dump()),
        "fourfold_version": __version__,
    }
