"""``fourfold verify``: is a checkpoint whole, and what its manifest says it is?"""

from pathlib import Path
from typing import Annotated

import typer


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder.")],
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the findings here.")] = None,
) -> None:
    """Check every file's hash, header and configuration; exit with 1 when something is wrong.

    Example: `fourfold verify my-model-mxfp4`
    """
    from rich.markup import escape

    from fourfold.checkpoint.verify import verify as examine
    from fourfold.cli.output import bytes_text, check_json_path, stdout, write_json

    check_json_path(json)
    report = examine(folder)
    write_json(json, report)
    for problem in report.problems:
        stdout.print(f"[red]problem:[/red] {escape(problem)}", soft_wrap=True)
    compared = (
        f"{report.files_hashed} files compared with the hashes in the manifest, {report.tensors_compared} "
        "tensors with what was in memory when they were written"
        if report.files_hashed or report.tensors_compared
        else "with no hashes to compare with"
    )
    verdict = "[green]whole[/green]" if report.passed else f"[red]{len(report.problems)} problem(s)[/red]"
    stdout.print(
        f"{escape(str(folder))}: {verdict}; {report.tensors} tensors, {report.quantized_tensors} quantized, "
        f"{bytes_text(report.size_bytes)}, dialect {report.dialect or 'unknown'}, "
        f"{compared}",
        soft_wrap=True,
    )
    if not report.passed:
        raise typer.Exit(1)
