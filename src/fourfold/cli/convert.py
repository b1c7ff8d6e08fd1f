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
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was interrupted.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the manifest here.")] = None,
) -> None:
    """Store a checkpoint in another dialect without touching a number.

    Example: `fourfold convert my-model-mxfp4 my-model-quark --dialect quark`
    """
    from rich.markup import escape

    from fourfold.checkpoint import open_checkpoint
    from fourfold.checkpoint.convert import convert as write_checkpoint
    from fourfold.cli.output import bytes_bar, bytes_text, check_json_path, stdout, write_json

    check_json_path(json)
    total, done = open_checkpoint(source).card().size_bytes, 0
    with bytes_bar("converting") as update:

        def progress(name: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            update(done, total, name)

        manifest = write_checkpoint(source, out, dialect, resume=resume, progress=progress)
    size = bytes_text(manifest.card.size_bytes)
    stdout.print(f"{escape(str(out))}: {size} in the dialect {dialect}", soft_wrap=True)
    write_json(json, manifest)
