"""Quantization from file to file: open, decide, run the passes, and stream every tensor to its shard."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fourfold import __version__
from fourfold.checkpoint import Checkpoint, CheckpointWriter
from fourfold.checkpoint.dialect import module_of
from fourfold.checkpoint.fingerprint import short_hash, source_fingerprint
from fourfold.checkpoint.writer import DEFAULT_SHARD_BYTES
from fourfold.compress.budget.groups import unlike
from fourfold.compress.calibration import Calibration
from fourfold.compress.experts import notes_for_readers
from fourfold.compress.model import Model
from fourfold.compress.pipeline import check_recipe, is_calibrated, prepare, run_passes, takes_calibration
from fourfold.compress.recipe import Recipe, load_recipe
from fourfold.compress.resolve import Resolved, open_source, resolve
from fourfold.compress.stream import stream
from fourfold.core.errors import UsageError
from fourfold.core.machine import installed_version
from fourfold.core.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from fourfold.compress.calibrated.run import Spread

DEFAULT_DIALECT = "compressed-tensors"
UNCALIBRATED_KV = (
    "The scales of the FP8 KV cache are ones, which cut off keys and values beyond 448; --calibration with a "
    "text would calibrate them."
)

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
    calibration: Calibration | None = None,
    device: str = "cpu",
    layer_progress: Callable[[int, int, str], None] | None = None,
    writing_progress: Callable[[int, int], None] | None = None,
    learning_progress: Callable[[str, int, int], None] | None = None,
    spread: "Spread | None" = None,
) -> Manifest:
    """Make the checkpoint ``out`` from ``source`` (a folder, a GGUF file, a hub name) by ``recipe``.

    A recipe with calibrated passes needs ``calibration``, and computes its layers on ``device``; one with an
    FP8 KV cache calibrates its scales where it is given.
    ``layer_progress(done, layers, name)`` is told of the first and of each that is finished, and
    ``writing_progress(done, samples)`` of the calibration sequences that the model writes itself,
    ``learning_progress(what, done, total)`` of what passes learn over the whole model. ``spread`` shares the
    layers among workers, where the recipe's ``inputs`` are ``original``. Returns the manifest that was
    written; with ``resume``, an ``out`` that the same arguments made is left as it is. Raises UsageError for
    a call or recipe that makes no sense and for any other existing ``out``, FourfoldError for a source that
    cannot be read or rounded; both before anything is written, save for NaN and Inf weights, which are found
    when they are read.
    """
    recipe = load_recipe(recipe)
    check_recipe(recipe)
    check_calibration(recipe, calibration)
    checkpoint = open_source(source)
    depends_on = fingerprint(checkpoint, recipe, calibration, device)
    if resume and (done := finished_manifest(Path(out), depends_on | {"dialect": dialect})) is not None:
        return done
    resolved = resolve(checkpoint, recipe)
    prepared = prepare(recipe, resolved.model)
    model = run_passes(recipe, prepared)
    writer = CheckpointWriter(
        Path(out),
        dialect,
        checkpoint.config,
        model.quantization,
        model.infos(),
        fingerprint=depends_on,
        resume=resume,
        max_shard_bytes=max_shard_bytes,
        kv_scales_follow=calibration is not None and takes_calibration(recipe),
    )
    finish = partial(
        writer.finish,
        source=str(source),
        recipe=recipe.model_dump(),
        generation_config=checkpoint.generation_config,
        write_tokenizer=checkpoint.write_tokenizer,
    )
    told = notes_of(checkpoint, resolved, model)
    if calibration is None or not takes_calibration(recipe):
        write_shards(writer, model, progress)
        return finish(notes=[*told, *([UNCALIBRATED_KV] if recipe.kv_cache else [])])
    # so that recipes without calibration never import transformers
    from fourfold.compress.calibrated.run import finish_layers

    seen = (layer_progress, writing_progress, spread, learning_progress)
    done = finish_layers(writer, prepared, model, recipe, calibration, torch.device(device), *seen)
    write_shards(writer, done.model, progress)
    notes = list(dict.fromkeys([*told, *done.notes]))
    return finish(notes=notes, calibration=done.calibration, tidy=done.tidy)


def notes_of(checkpoint: Checkpoint, resolved: Resolved, model: Model) -> list[str]:
    """What readers of the rounded ``model`` may stumble over, as far as it is known before it is made."""
    layers = model.quantization.layers
    modules = [module_of(name) for name in model.entries if name.endswith(".weight")]
    stumbles = [*unlike(modules, layers), *notes_for_readers(model.config, layers)]
    return [*checkpoint.notes, *resolved.notes, *stumbles]


def finished_manifest(out: Path, depends_on: dict[str, str]) -> Manifest | None:
    """The manifest of ``out`` where a run with the same arguments had just given it its name, and was killed
    before it could say so.
    """
    try:
        manifest = read_manifest(out)
    except ValueError:  # a damaged one
        return None
    same = manifest is not None and depends_on.items() <= manifest.fingerprint.items()
    return manifest if same else None


def check_calibration(recipe: Recipe, calibration: Calibration | None) -> None:
    """Raise UsageError when ``recipe`` lacks the calibration set it needs."""
    if calibration is None and is_calibrated(recipe):
        names = ", ".join([*(use.name for use in recipe.uses), *(["kv_cache"] if recipe.kv_cache else [])])
        raise UsageError(
            f"The recipe '{recipe.name}' looks at activations ({names}), but no calibration "
            "set was given. Give one with --calibration, or use a recipe without calibration (mxfp4)."
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


def fingerprint(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | None, device: str
) -> dict[str, str]:
    """What the numbers of an output depend on; the writer adds the dialect and the layout."""
    fields = {
        "source": source_fingerprint(checkpoint),
        "recipe": short_hash(recipe.model_dump()),
        "fourfold_version": __version__,
    }
    if calibration is not None and takes_calibration(recipe):
        fields |= calibration.fingerprint
        fields |= {"device": torch.device(device).type, "torch": torch.__version__}
        fields["transformers"] = installed_version("transformers") or "none"
    return fields
