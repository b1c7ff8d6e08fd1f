"""A dry run as a table: alike tensors of all layers share a line."""

import re
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from fourfold.cli.output import bytes_text, stdout
from fourfold.cli.stages import duration_text

if TYPE_CHECKING:
    from fourfold.compress.planning import DryRun, TensorPlan


def show_plan(record: "DryRun") -> None:
    """Print a dry run for a person."""
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
    gpu, disk = record.gpu_memory_bytes, record.temporary_disk_bytes
    stdout.print(
        f"{bytes_text(record.source_bytes)} become {bytes_text(record.output_bytes)} in {record.shards} "
        f"file(s); about {duration_text(record.time_estimate_s)}, peak memory about "
        f"{bytes_text(record.peak_memory_bytes)}"
        + (f" and {bytes_text(gpu)} on the GPU" if gpu is not None else "")
        + (f", {bytes_text(disk)} of disk beside the output while it runs" if disk else "")
        + ". Nothing was written.",
        soft_wrap=True,
    )
    if record.layer_s is not None:
        stdout.print(
            f"Told from one layer that was run on {record.device} with {record.calibration_samples} "
            f"sequences of {record.calibration_sequence_tokens} tokens, in {duration_text(record.layer_s)}.",
            soft_wrap=True,
        )
    for note in record.notes:
        stdout.print(f"Note: {escape(note)}", soft_wrap=True)


def grouped(tensors: "list[TensorPlan]") -> "list[tuple[str, list[TensorPlan]]]":
    """Tensors that differ only in the numbers in their names, under the name with * for the numbers."""
    groups: dict[tuple[object, ...], list[TensorPlan]] = {}
    for tensor in tensors:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name)
        key = (pattern, *tensor.shape, tensor.format, tensor.kept_because)
        groups.setdefault(key, []).append(tensor)
    return [(str(key[0]) if len(group) > 1 else group[0].name, group) for key, group in groups.items()]
