"""``fourfold formats``: the number formats side by side, on known distributions and on a model's tensors."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from fourfold.checkpoint import Checkpoint
    from fourfold.formats.numbers.survey import FormatRow, FormatSurvey

HEADINGS = {"gaussian": "Gauss", "laplace": "Laplace", "student-t3": "t3", "gaussian, 1% x20": "outliers"}


def formats(
    model: Annotated[
        str | None, typer.Argument(help="Measure also on this model's matrices (folder, GGUF, hub name).")
    ] = None,
    max_tensors: Annotated[
        int, typer.Option(min=0, help="Matrices taken of the model, spread through it; 0 takes all.")
    ] = 32,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Bits per value, range, and how near each format stays (SQNR in dB; 6 dB halve the error).

    Example: `fourfold formats my-model`
    """
    from fourfold.cli.output import check_json_path, progress_bar, write_json
    from fourfold.formats.numbers.survey import survey

    check_json_path(json)
    if model is None:
        record = survey()
    else:
        from fourfold.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(model)
        names = matrix_names(checkpoint, max_tensors)
        with progress_bar("matrices") as progress:
            record = survey(read(checkpoint, names, progress))
    show(record)
    write_json(json, record)


def matrix_names(checkpoint: "Checkpoint", count: int) -> list[str]:
    """Tensors of two and more dimensions, embeddings left out; ``count`` of them evenly spread; 0 is all."""
    from fourfold.checkpoint.dialect import EMBEDDING

    names = [n for n in checkpoint.names() if len(checkpoint.info(n).shape) > 1 and not EMBEDDING.search(n)]
    if not count or count >= len(names):
        return names
    return [names[i * len(names) // count] for i in range(count)]


def read(
    checkpoint: "Checkpoint", names: list[str], progress: Callable[[int, int], None]
) -> Iterator["tuple[str, torch.Tensor]"]:
    """Tensors one at a time; what is stored in a block format comes as its values."""
    import torch

    for done, name in enumerate(names):
        progress(done, len(names))
        value = checkpoint.load(name)
        yield name, value if isinstance(value, torch.Tensor) else value.dequantize()
    progress(len(names), len(names))


def show(record: "FormatSurvey") -> None:
    """Print the survey for a person."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fourfold.cli.output import stdout

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("format", no_wrap=True)
    for name in ("bits", "block", "scale", "range", *_distributions(record).values()):
        table.add_column(name, justify="right", no_wrap=True)
    if record.checkpoint is not None:
        table.add_column("model", justify="right", no_wrap=True)
    for row in record.formats:
        table.add_row(*cells(row, list(_distributions(record)), record.checkpoint is not None))
    stdout.print(table)
    stdout.print(_legend(record), soft_wrap=True)


def cells(row: "FormatRow", distributions: list[str], with_model: bool) -> list[str]:
    """One format's line."""
    figures = [_decibels(row.sqnr_db.get(name)) for name in distributions]
    model = [_decibels(row.checkpoint_sqnr_db)] if with_model else []
    block = str(row.block_size) if row.block_size else "row" if "tensor" not in row.name else "all"
    return [row.name, f"{row.bits_per_value:g}", block, row.scale, _short(row.block_range), *figures, *model]


def _distributions(record: "FormatSurvey") -> dict[str, str]:
    return {name: HEADINGS.get(name, name) for row in record.formats for name in row.sqnr_db}


def _short(value: float) -> str:
    """Three digits and a decimal prefix."""
    for prefix in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g}G"


def _decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _legend(record: "FormatSurvey") -> str:
    lines = [
        f"Right of range: SQNR in dB over {record.samples} samples, higher is nearer; – is no noise at all.",
        "Range: the largest over the smallest positive value that can stand under one scale.",
        "MXFP4 and INT4 in groups of 64 take the same 4.25 bits: the float grid is finer near zero, the "
        "integer grid near the largest value of a block; which is nearer hangs on the tails of the values.",
    ]
    if own := record.checkpoint:
        mx, integer = own.nearer["mxfp4"], own.nearer["int4-g64"]
        lines.append(
            f"Of the model's matrices {own.tensors} were measured, {own.skipped} skipped: MXFP4 has the "
            f"smaller error in {mx}, INT4-g64 in {integer}, equal in {own.equal}. The error of single "
            "weights is not the quality of the model: `fourfold evaluate` measures that."
        )
    return "\n".join(lines)
