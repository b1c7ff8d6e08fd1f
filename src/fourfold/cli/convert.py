"""``fourfold convert``: the same numbers under another ecosystem's names."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Quantized model folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    dialect: Annotated[
        str, typer.Option(metavar="NAME", help="Whose names to store under: compressed-tensors or quark.")
    ],
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the manifest here.")] = None,
) -> None:
    """Store a checkpoint in another dialect without touching a number.

    Example: `fourfold convert my-model-mxfp4 my-model-quark --dialect quark`
    """
    from fourfold.checkpoint.convert import convert as write_checkpoint
    from fourfold.cli.output import bytes_text, check_json_path, stdout, write_json

    check_json_path(json)
    manifest = write_checkpoint(source, out, dialect)
    stdout.print(f"{out}: {bytes_text(manifest.card.size_bytes)} in the dialect {dialect}", soft_wrap=True)
    write_json(json, manifest)
