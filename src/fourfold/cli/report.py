"""``fourfold report``: one page from all records."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that hold the records.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PAGE.html", help="The page to write.")],
) -> None:
    """Write one self-contained HTML page: quality, size, speed, and how each number was obtained.

    Example: `fourfold report results/bf16 results/mxfp4 -o page.html`
    """
    from rich.markup import escape

    from fourfold.cli.output import bytes_text, stdout
    from fourfold.core.errors import UsageError
    from fourfold.report import write_report

    if output.is_dir():
        raise UsageError(f"-o {output} is a folder. Name the HTML file to write.")
    study = write_report(folders, output)
    runs = sum(len(s.runs) for s in study.subjects)
    evaluations = sum(len(s.evaluations) for s in study.subjects)
    stdout.print(
        f"{escape(str(output))}: models {len(study.subjects)}, evaluations {evaluations}, runs {runs}, "
        f"{bytes_text(output.stat().st_size)}",
        soft_wrap=True,
    )
