"""An opened checkpoint: what it is, and its tensors one by one."""

import shutil
from pathlib import Path
from typing import Any

import torch

from fourfold.checkpoint.card import make_card
from fourfold.checkpoint.folder import VOCABULARIES, has_tokenizer, tokenizer_files
from fourfold.checkpoint.tensors import TensorInfo, TensorSource
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.manifest import Manifest
from fourfold.core.quantization import Quantization
from fourfold.core.records import ModelCard
from fourfold.formats import BlockTensor


class Checkpoint:
    """A model's configuration and tensors. Nothing is held open between calls.

    ``config`` is config.json without quantization_config; ``quantization`` is what that said. ``kv_scales``
    maps k_proj and v_proj modules to the scale of an FP8 KV cache, where the checkpoint stores one: float32
    [1], or [key heads] where ``quantization.kv_cache`` is ``fp8-head``.
    """

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        tensors: TensorSource,
        *,
        dialect: str,
        folder: Path | None = None,
        generation_config: dict[str, Any] | None = None,
        quantization: Quantization | None = None,
        manifest: Manifest | None = None,
        kv_scales: dict[str, torch.Tensor] | None = None,
        notes: list[str] | None = None,
    ):
        self.source, self.folder, self.dialect = source, folder, dialect
        self.config, self.generation_config = config, generation_config or {}
        self.quantization = quantization or Quantization()
        self.manifest = manifest
        self.kv_scales = kv_scales or {}
        self.notes = notes if notes is not None else (manifest.card.notes if manifest else [])
        self._tensors = tensors
        self._infos = tensors.infos()

    def names(self) -> list[str]:
        """Logical parameter names in file order; scales belong to their weight and are not listed."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """What is known of ``name`` without reading it. Raises UsageError for a name that is not there."""
        if name not in self._infos:
            raise UsageError(f"{self.source} has no tensor '{name}'. `fourfold verify` lists what is there.")
        return self._infos[name]

    def load(self, name: str) -> torch.Tensor | BlockTensor:
        """Read one tensor, and only its bytes. Raises FourfoldError when the file fails."""
        self.info(name)
        return self._tensors.load(name)

    def mapped(self, name: str) -> torch.Tensor | BlockTensor:
        """One tensor without a copy of what a file holds as it is: its bytes are read when they are touched.

        The files must not be changed in place as long as it lives; replacing them does no harm. Raises as
        ``load`` does.
        """
        self.info(name)
        return self._tensors.mapped(name)

    def card(self) -> ModelCard:
        """What the model is, from configuration and headers alone."""
        return make_card(
            self.display_name(), self.config, self._infos.values(), self.quantization, self.notes
        )

    def display_name(self) -> str:
        """The name for a table: the folder's, the file's without suffix, or the hub's."""
        path = Path(self.source)
        if not path.exists():
            return self.source
        return path.resolve().name.removesuffix(".gguf")

    def has_tokenizer(self) -> bool:
        """Whether ``write_tokenizer`` has something to write."""
        return self.folder is not None and has_tokenizer(self.folder)

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files on disk; empty when the tokenizer is inside a GGUF or missing."""
        return tokenizer_files(self.folder) if self.folder else []

    def write_tokenizer(self, folder: Path) -> list[Path]:
        """Put the tokenizer with its chat template into ``folder``.

        Raises FourfoldError when there is none.
        """
        if not self.has_tokenizer():
            raise no_tokenizer(self.source)
        return [Path(shutil.copyfile(file, folder / file.name)) for file in self.tokenizer_files()]


def no_tokenizer(source: str) -> FourfoldError:
    """The error for a model without a tokenizer where one is needed."""
    return FourfoldError(
        f"{source} holds no tokenizer (none of {', '.join(VOCABULARIES)}), and a model without one cannot be "
        "used. Copy the tokenizer's files from the model's origin into that folder."
    )
