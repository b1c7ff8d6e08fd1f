"""``fourfold quantize``: a checkpoint in, a checkpoint of fewer bits out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fourfold.cli.records import QuantizationRecord
    from fourfold.compress.planning import DryRun, TensorPlan


def quantize(
    source: Annotated[str, typer.Argument(help="Model folder, GGUF file or hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    recipe: Annotated[
        str, typer.Option(metavar="NAME_OR_FILE", help="A shipped recipe (mxfp4, bf16, …) or a YAML file.")
    ] = "mxfp4",
    dialect: Annotated[
        str, typer.Option(metavar="NAME", help="Whose names to store under: compressed-tensors or quark.")
    ] = "compressed-tensors",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be done and what it costs; write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was interrupted.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Write a model's linear layers in a microscaling format; the rest is kept as it is.

    Example: `fourfold quantize my-model my-model-mxfp4 --recipe mxfp4`
    """
    from fourfold.cli.output import check_json_path, write_json
    from fourfold.compress import plan

    check_json_path(json)
    if dry_run:
        record = plan(source, recipe, dialect)
        show_plan(record)
    else:
        record = run(source, out, recipe, dialect, resume)
        show(record)
    write_json(json, record)


def run(source: str, out: Path, recipe: str, dialect: str, resume: bool) -> "QuantizationRecord":
    """Quantize under a progress bar, timed."""
    import resource
    import time

    from fourfold.checkpoint import open_checkpoint
    from fourfold.cli.output import bytes_bar
    from fourfold.cli.records import QuantizationRecord
    from fourfold.compress import load_recipe
    from fourfold.compress import quantize as write_checkpoint
    from fourfold.core.machine import describe_machine, now

    begin = time.perf_counter()
    with bytes_bar("quantizing") as progress:
        manifest = write_checkpoint(source, out, recipe, dialect, resume=resume, progress=progress)
    seconds = time.perf_counter() - begin
    peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return QuantizationRecord(
        created=now(),
        source=source,
        out=str(out),
        recipe=load_recipe(recipe).name,
        dialect=manifest.dialect,
        source_card=open_checkpoint(source).card(),
        card=manifest.card,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes,
        machine=describe_machine(),
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
    for note in record.card.notes:
        stdout.print(f"Note: {escape(note)}", soft_wrap=True)


def show_plan(record: "DryRun") -> None:
    """Print a dry run for a person: alike tensors of all layers share a line."""
    from rich.markup import escape
    from rich.table import Table

    from fourfold.cli.output import bytes_text, stdout

    table = Table()
    for column in ("tensors", "count", "shape", "becomes", "size"):
        table.add_column(column, overflow="fold", justify="right" if column in ("count", "size") else "left")
    for name, group in grouped([*record.quantized, *record.kept]):
        first = group[0]
        becomes = (
            first.format if first.kept_because is None else f"{first.format}, kept: {first.kept_because}"
        )
        size = bytes_text(sum(tensor.nbytes for tensor in group))
        table.add_row(escape(name), str(len(group)), "×".join(map(str, first.shape)), becomes, size)
    stdout.print(table)
    stdout.print(
        f"{bytes_text(record.source_bytes)} become {bytes_text(record.output_bytes)} in {record.shards} "
        f"file(s); about {record.time_estimate_s:.1f} s, peak memory about "
        f"{bytes_text(record.peak_memory_bytes)}. Nothing was written.",
        soft_wrap=True,
    )


def grouped(tensors: "list[TensorPlan]") -> "list[tuple[str, list[TensorPlan]]]":
    """Tensors that differ only in the numbers in their names, under the name with * for the numbers."""
    import re

    groups: dict[tuple[object, ...], list[TensorPlan]] = {}
    for tensor in tensors:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name)
        key = (pattern, *tensor.shape, tensor.format, tensor.kept_because)
        groups.setdefault(key, []).append(tensor)
    return [(str(key[0]) if len(group) > 1 else group[0].name, group) for key, group in groups.items()]
