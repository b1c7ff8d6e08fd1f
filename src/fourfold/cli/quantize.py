"""``fourfold quantize``: a checkpoint in, a checkpoint of fewer bits out."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.core.imports import importing

if TYPE_CHECKING:
    from fourfold.cli.calibration import Asked
    from fourfold.cli.records import QuantizationRecord
    from fourfold.compress import DryRun, Recipe
    from fourfold.compress.calibration import Calibration
    from fourfold.core.manifest import Manifest
    from fourfold.core.records import Frontier


def quantize(
    source: Annotated[str, typer.Argument(help="Model folder, GGUF file or hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    recipe: Annotated[
        str, typer.Option(metavar="NAME_OR_FILE", help="A shipped recipe (mxfp4, bf16, …) or a YAML file.")
    ] = "mxfp4",
    dialect: Annotated[
        str, typer.Option(metavar="NAME", help="Whose names to store under: compressed-tensors or quark.")
    ] = "compressed-tensors",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE_OR_NAME",
            help="For recipes that look at activations: a text file, a JSONL file with `text` or `messages`, "
            "or a dataset's name. [default: text that the model writes itself]",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 512,
    sequence_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Decides the calibration sequences.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(metavar="cpu|cuda", help="Where layers are calibrated. [default: cuda if there is one]"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="4.5bits|1.2GB|kl=0.05",
            help="Choose each layer's format by measurement: mean bits of a rounded weight, size of all "
            "tensors, or largest predicted KL. With --dry-run only the frontier is shown.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Share the layers among so many Ray actors; for recipes with `inputs: original`."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be done and what it costs; write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was interrupted.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Write a model's linear layers in a microscaling format; the rest is kept as it is.

    Example: `fourfold quantize my-model my-model-mxfp4 --recipe mxfp4`
    """
    with importing():
        import fourfold.compress  # noqa: F401 -- and torch
        from fourfold.cli.budget import fit, show_choice
        from fourfold.cli.calibration import Asked
        from fourfold.cli.output import check_json_path, write_json
        from fourfold.cli.plan_table import show_plan
        from fourfold.compress import load_recipe

    check_json_path(json)
    asked = Asked(calibration, samples, sequence_tokens, seed)
    job = Job(source, out, recipe, dialect, asked, device, workers, resume, budget)
    if dry_run and budget is not None:
        chosen_from = load_recipe(recipe)
        _, record = fit(source, chosen_from, dialect, budget, *measured_by(job, chosen_from))
        show_choice(record, out)
    elif dry_run:
        record = predict(job)
        show_plan(record)
    else:
        record = run(job)
        show(record)
    write_json(json, record)


@dataclass(frozen=True)
class Job:
    """What one call of the command asks for."""

    source: str
    out: Path
    recipe: str
    dialect: str
    calibration: "Asked"
    device: str | None
    workers: int | None
    resume: bool
    budget: str | None


def measured_by(job: Job, recipe: "Recipe") -> "tuple[Calibration, str]":
    """What formats are measured on for a budget, and the device that does it."""
    from fourfold.cli.budget import measured_on
    from fourfold.cli.calibration import choose_device

    device = choose_device(job.device, recipe, measures=True)
    return measured_on(job.source, job.calibration, device), device


def chosen_recipe(job: Job) -> "tuple[Recipe, Frontier | None]":
    """The job's recipe, within its budget if it has one, and the frontier unless an interrupted run chose.

    Raises UsageError before anything is measured when ``out`` is there, or an interrupted run's work and no
    ``resume``: a choice made anew could differ by a hair, and that work would be lost.
    """
    from fourfold.checkpoint.journal import refuse_interrupted
    from fourfold.checkpoint.writer import partial_folder, refuse_existing
    from fourfold.cli.budget import choice_fingerprint, fit, resumed_recipe, show_choice, write_recipe
    from fourfold.compress import load_recipe

    recipe = load_recipe(job.recipe)
    if job.budget is None:
        return recipe, None
    if not job.resume:
        refuse_interrupted(partial_folder(job.out))
    calibration, device = measured_by(job, recipe)
    chosen_for = choice_fingerprint(job.source, recipe, job.dialect, job.budget, calibration)
    if job.resume and (kept := resumed_recipe(job.out, chosen_for)) is not None:
        return kept, None
    refuse_existing(job.out)
    recipe, frontier = fit(job.source, recipe, job.dialect, job.budget, calibration, device)
    write_recipe(recipe, job.out, chosen_for)  # before anything else can fail: it may have taken hours
    show_choice(frontier, job.out)
    return recipe, frontier


def predict(job: Job) -> "DryRun":
    """What the job would do and cost; a calibrated one runs one of its layers for that."""
    import time

    from fourfold.cli.calibration import calibration_for, choose_device
    from fourfold.compress import load_recipe, plan

    begin = time.perf_counter()
    recipe = load_recipe(job.recipe)
    device = choose_device(job.device, recipe)
    calibration = calibration_for(recipe, job.source, job.calibration, device)
    reading_s = time.perf_counter() - begin
    folder = job.out.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    record = plan(job.source, recipe, job.dialect, calibration=calibration, device=device, beside=folder)
    return record.model_copy(update={"time_estimate_s": record.time_estimate_s + reading_s})


def run(job: Job) -> "QuantizationRecord":
    """Quantize under a progress display, timed."""
    import time

    from fourfold.cli.calibration import calibration_for, choose_device, spread_for
    from fourfold.cli.stages import stages
    from fourfold.compress import quantize as write_checkpoint

    begin = time.perf_counter()
    recipe, frontier = chosen_recipe(job)
    device = choose_device(job.device, recipe)
    measured = job.budget is not None
    calibration = calibration_for(recipe, job.source, job.calibration, device, measured)
    spread = spread_for(job.workers, job.source, recipe, device)
    with stages() as display:
        manifest = write_checkpoint(
            job.source,
            job.out,
            recipe,
            job.dialect,
            resume=job.resume,
            progress=display.written,
            calibration=calibration,
            device=device,
            layer_progress=display.layers,
            writing_progress=display.sequences,
            learning_progress=display.learned,
            spread=spread,
        )
    record = record_of(job, manifest, device, time.perf_counter() - begin)
    return record.model_copy(update={"frontier": frontier})


def record_of(job: Job, manifest: "Manifest", device: str, seconds: float) -> "QuantizationRecord":
    """The figures of a finished run."""
    import resource

    from fourfold.checkpoint import open_checkpoint
    from fourfold.cli.calibration import gpu_name, gpu_peak_bytes
    from fourfold.cli.records import QuantizationRecord
    from fourfold.core.machine import describe_machine, now

    assert manifest.recipe is not None
    return QuantizationRecord(
        created=now(),
        source=job.source,
        out=str(job.out),
        recipe=manifest.recipe["name"],
        dialect=manifest.dialect,
        source_card=open_checkpoint(job.source).card(),
        card=manifest.card,
        calibration=manifest.calibration,
        device=device if manifest.calibration else "cpu",
        seconds=seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_gpu_memory_bytes=gpu_peak_bytes(device),
        machine=describe_machine(gpu_name(device)),
    )


def show(record: "QuantizationRecord") -> None:
    """Print the summary for a person."""
    from rich.markup import escape
    from rich.table import Table

    from fourfold.cli.output import bytes_text, stdout

    table = Table("", "format", "size", "bits per weight")
    for label, card in ((record.source, record.source_card), (record.out, record.card)):
        table.add_row(
            escape(label), card.weight_format, bytes_text(card.size_bytes), f"{card.bits_per_weight:.2f}"
        )
    stdout.print(table)
    stdout.print(
        f"{escape(record.out)}: recipe {escape(record.recipe)}, dialect {record.dialect}, "
        f"{record.seconds:.1f} s, peak memory {bytes_text(record.peak_memory_bytes)}",
        soft_wrap=True,
    )
    if (seen := record.calibration) is not None:
        stdout.print(
            f"Calibrated on {seen['samples']} sequences of {seen['sequence_tokens']} tokens, "
            f"{escape(seen['source'])}, seed {seen['seed']}.",
            soft_wrap=True,
        )
    for note in record.card.notes:
        stdout.print(f"Note: {escape(note)}", soft_wrap=True)
