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
    from fourfold.checkpoint.verify import verify as examine
    from fourfold.cli.output import check_json_path, stdout, write_json

    check_json_path(json)
    report = examine(folder)
    stdout.print(report, soft_wrap=True)
    write_json(json, report)
