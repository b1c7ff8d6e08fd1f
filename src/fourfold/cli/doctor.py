"""``fourfold doctor``: what this machine and installation can do, and what to do about each problem."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fourfold.cli.checkup import DoctorRecord


def doctor(
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the findings here.")] = None,
) -> None:
    """Look at Python, torch, the CPU, the C++ kernels, memory, disk and GPU; exit with 1 when one is broken.

    Example: `fourfold doctor`
    """
    from fourfold.cli.checkup import examine
    from fourfold.cli.output import check_json_path, write_json

    check_json_path(json)
    record = examine(Path.cwd())
    show(record)
    write_json(json, record)
    if any(check.state == "broken" for check in record.checks):
        raise typer.Exit(1)


def show(record: "DoctorRecord") -> None:
    """Print the findings for a person."""
    from rich.markup import escape
    from rich.table import Table

    from fourfold.cli.output import stdout

    colours = {"good": "green", "warning": "yellow", "broken": "red"}
    table = Table("", "state", "found", "what to do")
    for check in record.checks:
        state = f"[{colours[check.state]}]{check.state}[/]"
        table.add_row(check.name, state, escape(check.found), escape(check.remedy or ""))
    stdout.print(table)
