"""Open a GGUF file; expand its tensors to bf16 one by one.

A tensor's bytes are read by their offset and expanded a slice of rows at a time, so that memory is that of
one bf16 tensor and a constant. For Llama, the rows of q and k come back in transformers' order: the converter
of llama.cpp stores each head's two halves interleaved.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fourfold.checkpoint.checkpoint import Checkpoint
from fourfold.checkpoint.folder import tokenizer_files
from fourfold.checkpoint.gguf.experts import cut
from fourfold.checkpoint.gguf.header import Stored, read_header
from fourfold.checkpoint.gguf.metadata import architecture_of, model_config, token_ids
from fourfold.checkpoint.gguf.names import parameter_names
from fourfold.checkpoint.gguf.rope import TENSOR as ROPE_DIVISORS
from fourfold.checkpoint.storage.header import broken, short
from fourfold.checkpoint.storage.reader import read_into
from fourfold.checkpoint.tensors import TensorInfo
from fourfold.core.errors import FourfoldError
from fourfold.formats import BlockTensor

SLICE_VALUES = 1 << 20
UNROUNDED = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Placed:
    """A stored tensor; ``heads`` is the number of heads when its rows are permuted, ``offset`` what was added
    to its values.
    """

    stored: Stored
    heads: int | None
    offset: float = 0.0


class GGUFTensors:
    """The tensors of a GGUF file under their parameter names, all bf16."""

    def __init__(self, path: Path, tensors: dict[str, Placed]):
        self.path, self.tensors = path, tensors

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor in file order."""
        return {
            name: TensorInfo(name, shape, torch.bfloat16, None, 2 * math.prod(shape), self.path.name)
            for name, shape in ((name, placed.stored.shape) for name, placed in self.tensors.items())
        }

    def load(self, name: str) -> torch.Tensor | BlockTensor:
        """Read and expand one tensor. Raises FourfoldError when the file is too short."""
        placed = self.tensors[name]
        values = expand(read_bytes(self.path, placed.stored), placed.stored, placed.offset)
        return values if placed.heads is None else unpermute(values, placed.heads)

    mapped = load  # there is nothing to map, since every tensor is expanded


class GGUFCheckpoint(Checkpoint):
    """A checkpoint whose tokenizer is inside the GGUF file."""

    def has_tokenizer(self) -> bool:
        """Always: a GGUF file that has none fails in ``write_tokenizer``."""
        return True

    def write_tokenizer(self, folder: Path) -> list[Path]:
        """Have transformers rebuild the tokenizer with its chat template.

        Raises FourfoldError when it cannot.
        """
        from transformers import AutoTokenizer

        path = Path(self.source)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # transformers raises many kinds for a vocabulary it cannot rebuild
            raise FourfoldError(
                f"transformers cannot rebuild the tokenizer inside {path} ({type(error).__name__}: "
                f"{short(str(error))}). Start from the model's Hugging Face folder instead."
            ) from error
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # a full disk is no OSError here: the tokenizers library has its own
            raise FourfoldError(
                f"The tokenizer cannot be written into {folder} ({short(str(error))}). Free some space, "
                "check the rights, and run the same command again (quantize and convert with --resume)."
            ) from error
        return tokenizer_files(folder)


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file. Raises FourfoldError for a damaged file, or a model that cannot be expressed."""
    metadata, stored = read_header(path)
    divisors = next((_divisors(path, s) for s in stored if s.name == ROPE_DIVISORS), None)
    config = model_config(path, metadata, {s.name: s.shape for s in stored}, divisors)
    tensors = _named(path, metadata, config, [s for s in stored if s.name != ROPE_DIVISORS])
    generation = token_ids(metadata)
    return GGUFCheckpoint(
        str(path),
        config,
        GGUFTensors(path, tensors),
        dialect="gguf",
        generation_config=generation,
        notes=_notes(stored),
    )


def read_bytes(path: Path, stored: Stored) -> np.ndarray:
    """The stored bytes of one tensor. Raises FourfoldError when the file is too short."""
    raw = np.empty(stored.nbytes, dtype=np.uint8)
    read_into(path, stored.begin, raw.data, stored.name)
    return raw


def expand(raw: np.ndarray, stored: Stored, offset: float = 0.0) -> torch.Tensor:
    """bf16 [stored.shape] from a tensor's bytes, less ``offset``; computed in float32 and rounded once."""
    rows = raw.reshape(stored.shape[0], -1) if len(stored.shape) > 1 else raw.reshape(1, -1)
    result = torch.empty(stored.shape, dtype=torch.bfloat16)
    flat = result.view(rows.shape[0], -1)
    step = max(1, SLICE_VALUES // max(1, flat.shape[1]))
    for start in range(0, rows.shape[0], step):
        part = gguf.dequantize(_typed(rows[start : start + step], stored.type), stored.type)
        values = torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))
        flat[start : start + step] = values - offset if offset else values
    return result


def unpermute(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads, half, 2] to [heads, 2, half]: from interleaved rotary pairs to transformers' halves."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _divisors(path: Path, stored: Stored) -> np.ndarray:
    if stored.type != gguf.GGMLQuantizationType.F32:
        raise broken(path, f"its tensor '{stored.name}' is {stored.type.name} and not F32")
    return read_bytes(path, stored).view(np.float32).reshape(stored.shape)


def _typed(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    # the gguf package wants these three as numbers and everything else as bytes
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    return rows.view(plain[kind.name]) if kind.name in plain else rows


def _named(
    path: Path, metadata: dict[str, Any], config: dict[str, Any], stored: list[Stored]
) -> dict[str, Placed]:
    architecture = architecture_of(path, metadata)
    experts = architecture.experts
    router = experts.router if experts else None
    names = parameter_names(metadata["general.architecture"], int(config["num_hidden_layers"]), router)
    heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}
    tensors: dict[str, Placed] = {}
    for tensor in stored:
        if experts and (pieces := dict(cut(tensor, experts, config[experts.count]))):
            tensors |= {name: Placed(piece, None) for name, piece in pieces.items()}
            continue
        name = names.get(tensor.name)
        if name is None:
            raise FourfoldError(
                f"{path} holds the tensor '{short(tensor.name)}', which has no place in a "
                f"{config['architectures'][0]}. Start from the model's Hugging Face folder instead."
            )
        own = next((n for part, n in heads.items() if part in name), None) if architecture.permuted else None
        if own is not None and tensor.shape[0] % (2 * own):
            raise broken(
                path,
                f"its tensor '{short(tensor.name)}' has {tensor.shape[0]} rows, no pairs for {own} heads",
            )
        is_norm = name.endswith("norm.weight")
        tensors[name] = Placed(tensor, own, architecture.norm_offset if is_norm else 0.0)
    return tensors


def _notes(stored: list[Stored]) -> list[str]:
    kinds = Counter(t.type.name for t in stored if t.type.name not in UNROUNDED)
    if not kinds:
        return []
    listed = ", ".join(f"{kind} ({count} tensor{'s' * (count > 1)})" for kind, count in kinds.most_common())
    return [f"The weights were once rounded to {listed} in a GGUF file and are expanded to bf16 here."]
