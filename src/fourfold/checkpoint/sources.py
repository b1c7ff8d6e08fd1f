"""From what a person names, a folder, a GGUF file or a hub name, to an opened Checkpoint."""

from pathlib import Path
from typing import Any

import pydantic
import torch

from fourfold.checkpoint.checkpoint import Checkpoint
from fourfold.checkpoint.dialect import DIALECTS, Dialect, Entry, get_dialect
from fourfold.checkpoint.folder import GENERATION_CONFIG, read_model_config, read_optional_json, read_shards
from fourfold.checkpoint.input_feedback import with_feedback
from fourfold.checkpoint.storage.header import short
from fourfold.checkpoint.storage.reader import map_tensor, read_tensor
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.manifest import MANIFEST_NAME, Manifest, read_manifest
from fourfold.formats import BlockTensor

QUANTIZATION_CONFIG = "quantization_config"


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a local Hugging Face folder, a GGUF file, or a hub name (``owner/model``; local cache first).

    Reads configuration and headers only. Raises UsageError when ``source`` is nothing of these, FourfoldError
    when it is damaged.
    """
    path = Path(source)
    if path.is_dir():
        return open_folder(path, str(source))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{path} is a file but not a *.gguf. Name the model's folder, or a GGUF file.")
        from fourfold.checkpoint.gguf.source import open_gguf  # gguf is only needed for such a file

        return open_gguf(path)
    from fourfold.checkpoint.hub import download  # so that local folders need no network library

    return open_folder(download(str(source)), str(source))


def open_folder(folder: Path, source: str | None = None) -> Checkpoint:
    """Open a Hugging Face folder; ``source`` is the name to show for it."""
    config = read_model_config(folder)
    dialect = _detect(folder, config)
    stored = read_shards(folder)
    reading = dialect.read(config, stored, read_tensor)
    quantization = with_feedback(reading.quantization, config)
    return Checkpoint(
        source or str(folder),
        {key: value for key, value in config.items() if key != QUANTIZATION_CONFIG},
        FolderTensors(dialect, reading.entries),
        dialect=dialect.name,
        folder=folder,
        generation_config=read_optional_json(folder / GENERATION_CONFIG),
        quantization=quantization,
        manifest=manifest_of(folder),
        kv_scales=reading.kv_scales,
    )


class FolderTensors:
    """The tensors of a folder, put together by its dialect."""

    def __init__(self, dialect: Dialect, entries: dict[str, Entry]):
        self.dialect, self.entries = dialect, entries

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor in file order."""
        return {name: entry.info for name, entry in self.entries.items()}

    def load(self, name: str) -> torch.Tensor | BlockTensor:
        """Read one tensor."""
        return self.dialect.assemble(self.entries[name], read_tensor)

    def mapped(self, name: str) -> torch.Tensor | BlockTensor:
        """Map one tensor."""
        return self.dialect.assemble(self.entries[name], map_tensor)


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest, or None. Raises FourfoldError for one that cannot be understood."""
    try:
        return read_manifest(folder)
    except ValueError as error:
        why = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else str(error)
        raise FourfoldError(
            f"{folder / MANIFEST_NAME} cannot be understood ({short(why)}). It was damaged, changed by hand, "
            "or written by a newer Fourfold: copy it again, update, or remove the file to read the folder "
            "without it."
        ) from error


def _detect(folder: Path, config: dict[str, Any]) -> Dialect:
    quantization_config = config.get(QUANTIZATION_CONFIG)
    if quantization_config is not None and not isinstance(quantization_config, dict):
        raise FourfoldError(
            f"{folder / 'config.json'} has a {QUANTIZATION_CONFIG} that is not an object. Copy config.json "
            "again."
        )
    claiming = filter(lambda d: d.claims(quantization_config), map(get_dialect, DIALECTS.names()))
    dialect = next(claiming, None)
    if dialect is None:
        method = short(str((quantization_config or {}).get("quant_method")))
        raise FourfoldError(
            f"{folder} is quantized by the method '{method}', which Fourfold does not read. "
            f"It reads: {', '.join(DIALECTS.names())}. Start from the unquantized model."
        )
    return dialect
