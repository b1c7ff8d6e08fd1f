"""Fused experts, cut into the per-expert linear layers that vLLM and llm-compressor expect.

transformers 5 holds all experts of a layer in two tensors: ``experts.gate_up_proj`` [E, 2I, H] and
``experts.down_proj`` [E, H, I]. gpt-oss, Llama 4 and Qwen3-VL-MoE as released hold them transposed, [E, H,
2I] and [E, I, H]; gpt-oss interleaves gate and up, the others put gate before up. Granite MoE calls the two
``input_linear.weight`` and ``output_linear.weight``. (Source: transformers 5.23, models/*/modeling_*.py,
integrations/moe.py and conversion_mapping.py.) They become ``experts.{e}.gate_proj.weight``,
``experts.{e}.up_proj.weight`` [I, H] and ``experts.{e}.down_proj.weight`` [H, I], the input dimension last.

The orientation follows from the shapes and ``hidden_size``; where they leave it open (a square down_proj),
from the other tensor of the same experts, then from the model type. What stays open is an error, never a
guess.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fourfold.compress.names import text_config
from fourfold.core.errors import FourfoldError

Shape = tuple[int, ...]

# leaf name -> the projections in it; a pair is gate and up
FUSED_LEAVES: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
GRANITE_LEAVES: dict[str, tuple[str, ...]] = {"input_linear": ("w1", "w3"), "output_linear": ("w2",)}
DOWN = frozenset({"down_proj", "output_linear"})

TRANSPOSED_TYPES = frozenset(
    {"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}  # some as released, some always
)
INTERLEAVED_TYPES = frozenset({"gpt_oss"})


@dataclass(frozen=True)
class Fused:
    """A fused tensor's name taken apart: ``experts`` is the prefix that per-expert names share."""

    experts: str
    leaf: str
    projections: tuple[str, ...]
    bias: bool


@dataclass(frozen=True)
class Piece:
    """One expert's projection inside a fused tensor. ``take`` gives [out, in], or [out] of a bias."""

    name: str
    shape: Shape
    expert: int
    transposed: bool
    rows: slice

    def take(self, fused: torch.Tensor) -> torch.Tensor:
        """This piece, contiguous, in the dtype of ``fused`` [E, ...]."""
        return self._view(fused).contiguous()

    def put(self, fused: torch.Tensor, value: torch.Tensor) -> None:
        """The reverse of ``take``: write ``value`` where this piece lies in ``fused``."""
        self._view(fused).copy_(value)

    def _view(self, fused: torch.Tensor) -> torch.Tensor:
        matrix = fused[self.expert]
        return (matrix.T if self.transposed else matrix)[self.rows]


def parse_fused(name: str, shape: Shape) -> Fused | None:
    """``name`` taken apart, or None when it is not a fused expert tensor of a known kind."""
    stem, _, last = name.rpartition(".")
    if last == "weight":
        stem, _, last = stem.rpartition(".")
        if last in GRANITE_LEAVES and stem.endswith("block_sparse_moe") and len(shape) == 3:
            return Fused(f"{stem}.experts", last, GRANITE_LEAVES[last], bias=False)
    bias = last.endswith("_bias")
    leaf = last.removesuffix("_bias")
    if not stem.endswith(".experts") or leaf not in FUSED_LEAVES or len(shape) != (2 if bias else 3):
        return None
    return Fused(stem, leaf, FUSED_LEAVES[leaf], bias)


def unfuse(name: str, shapes: Mapping[str, Shape], config: dict[str, Any]) -> list[Piece]:
    """The pieces of the fused tensor ``name``, expert by expert. ``shapes`` holds every tensor of the
    checkpoint.

    Raises FourfoldError when the layout does not follow from shapes and model type.
    """
    fused = parse_fused(name, shapes[name])
    assert fused is not None
    transposed = not fused.bias and is_transposed(name, fused, shapes, config)
    count, *matrix = shapes[name]
    rows, *columns = reversed(matrix) if transposed else matrix
    return [
        Piece(
            name=f"{fused.experts}.{expert}.{projection}.{'bias' if fused.bias else 'weight'}",
            shape=(rows // len(fused.projections), *columns),
            expert=expert,
            transposed=transposed,
            rows=cut,
        )
        for expert in range(count)
        for projection, cut in zip(
            fused.projections, _cuts(name, fused, rows, transposed, config), strict=True
        )
    ]


def is_transposed(name: str, fused: Fused, shapes: Mapping[str, Shape], config: dict[str, Any]) -> bool:
    """Whether the experts' tensors are [E, in, out]. Raises FourfoldError when nothing tells."""
    hidden = text_config(config).get("hidden_size")
    answers = {
        answer
        for other, shape in shapes.items()
        if (kin := parse_fused(other, shape)) and kin.experts == fused.experts and not kin.bias
        if (answer := _by_shape(kin, shape, hidden)) is not None
    }
    if len(answers) == 1:
        return answers.pop()
    model_type = text_config(config).get("model_type")
    if not answers and hidden in shapes[name] and model_type not in ("qwen3_vl_moe", "qwen3_vl_moe_text"):
        return model_type in TRANSPOSED_TYPES
    raise unknown_layout(
        name, shapes[name], f"which of its dimensions is the input (hidden_size is {hidden})"
    )


def notes_for_readers(config: dict[str, Any], modules: Iterable[str]) -> list[str]:
    """What must be known of rounded ``modules`` whose experts not every reader looks for one by one."""
    model_type = text_config(config).get("model_type")
    if model_type not in INTERLEAVED_TYPES or not any(".experts." in module for module in modules):
        return []
    return [
        f"The experts of {model_type} lie here one by one (gate_proj, up_proj, down_proj), as llm-compressor "
        "stores them. Of them transformers finds none and only warns, and Quark looks for gate_up_proj."
    ]


def unknown_layout(name: str, shape: Shape, what: str) -> FourfoldError:
    """The error for experts that cannot be taken apart; they are never kept in silence."""
    return FourfoldError(
        f"{name} {list(shape)} looks like several linear layers in one tensor, but Fourfold cannot tell "
        f"{what}. To keep it unquantized, add a `keep` entry '{name.removesuffix('.weight')}' to the recipe."
    )


def _by_shape(fused: Fused, shape: Shape, hidden: object) -> bool | None:
    _, rows, columns = shape
    if (rows == hidden) == (columns == hidden):
        return None
    hidden_is_last = columns == hidden
    return hidden_is_last if fused.leaf in DOWN else not hidden_is_last


def _cuts(name: str, fused: Fused, rows: int, transposed: bool, config: dict[str, Any]) -> list[slice]:
    if len(fused.projections) == 1:
        return [slice(0, rows)]
    model_type = text_config(config).get("model_type")
    if rows % 2:
        raise unknown_layout(name, (rows,), "how an odd number of rows divides into gate and up")
    if model_type in INTERLEAVED_TYPES:
        return [slice(0, None, 2), slice(1, None, 2)]
    if transposed and model_type not in TRANSPOSED_TYPES:
        raise unknown_layout(name, (rows,), f"how gate and up lie in the experts of model type {model_type}")
    return [slice(0, rows // 2), slice(rows // 2, rows)]
