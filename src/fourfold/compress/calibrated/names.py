"""transformers' parameters and the checkpoint's tensors, matched by name.

A checkpoint names its tensors as they were released, and transformers renames many of them when it loads
(``conversion_mapping.py``: Mixtral's ``block_sparse_moe`` is ``mlp`` in its modules, the decoder of a
multimodal model lies one level deeper). Its own renamings are applied to every name of the checkpoint, and
the result is kept as a table. Experts are matched one by one. A tensor that holds all experts of a layer,
because the recipe keeps it, is cut into them for calibration and put together again.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fourfold.compress.calibrated.experts import parameters_apart
from fourfold.compress.experts import Piece, parse_fused, unfuse
from fourfold.compress.model import Model, Value, is_finite, plain
from fourfold.core.errors import FourfoldError

EXPERT_LEAF = re.compile(r"(\.experts\.\d+\.)(w1|w2|w3)\.")
HEAD = "lm_head.weight"  # which a checkpoint may leave out
LETTERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class Source:
    """Where a parameter's values are: the tensor ``stored``, or ``piece`` of it. ``name`` is what the
    parameter is called in a checkpoint of separate experts; ``order`` counts tensors as they are stored.
    """

    name: str
    stored: str
    piece: Piece | None
    order: int

    def take(self, value: Value) -> torch.Tensor:
        """The parameter, out of what is stored."""
        tensor = plain(value)
        return tensor if self.piece is None else self.piece.take(tensor)


class Names:
    """Parameters (and stored buffers) of transformers' ``net``, experts apart, by their ``Source``."""

    def __init__(self, net: nn.Module, model: Model):
        self.model = model
        self._table: dict[str, Source] = {}
        known = parameters_apart(net)
        tensors = list(_tensors(model))
        # transformers' renamings are hundreds of patterns to compile
        literal = {name for name, _, _ in tensors} ^ known <= {HEAD}
        rename = str if literal else renaming(net)
        for order, (name, piece, stored) in enumerate(tensors):
            parameter = next((p for p in spellings(rename(name), net) if p in known), None)
            if parameter is not None:
                self._table.setdefault(parameter, Source(name, stored, piece, order))

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._table

    def __getitem__(self, parameter: str) -> Source:
        """Raises FourfoldError when the checkpoint does not hold ``parameter``."""
        if parameter not in self._table:
            raise FourfoldError(
                f"transformers expects a parameter {parameter}, for which the checkpoint holds no tensor. "
                "The folder is incomplete, or this architecture stores its weights in a form that Fourfold "
                "cannot take apart; a recipe without calibration (mxfp4) does not need to."
            )
        return self._table[parameter]

    def held(self, inside: str) -> set[str]:
        """The checkpoint's names of all parameters below the module ``inside``."""
        return {source.name for name, source in self._table.items() if name.startswith(f"{inside}.")}

    def values(self, parameters: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
        """Each parameter with its tensor, in the order of the checkpoint, reading each stored tensor once.

        Raises FourfoldError that names a tensor with NaN or Inf, whether the recipe rounds it or keeps it.
        """
        stored, value = None, None
        for parameter in sorted(parameters, key=lambda p: self[p].order):
            source = self[parameter]
            if source.stored != stored:
                value = None  # let go of the last one before the next is read
                stored, value = source.stored, self.model[source.stored]
                check_numbers(stored, value)
            assert value is not None
            yield parameter, source.take(value)

    def assemble(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """``values`` by ``Source.name``, with experts together where the checkpoint holds them together."""
        found = dict(values)
        pieces = {s.name: s for s in self._table.values() if s.piece is not None and s.name in values}
        for name, source in pieces.items():
            info = self.model.entries[source.stored].info
            assert info.dtype is not None and source.piece is not None
            whole = found.setdefault(source.stored, torch.empty(info.shape, dtype=info.dtype))
            source.piece.put(plain(whole), plain(found.pop(name)))
        return found


def check_numbers(name: str, value: Value) -> None:
    """Raise FourfoldError when the tensor ``name``, which calibration computes with, holds NaN or Inf."""
    if not is_finite(value):
        raise FourfoldError(
            f"{name} holds NaN or Inf, so that nothing that the model computes tells how to round. The "
            "source is damaged or the model diverged: fetch it again."
        )


def renaming(net: nn.Module) -> Callable[[str], str]:
    """The function that turns a checkpoint's name into that of transformers' module tree."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.modeling_utils import PreTrainedModel

    assert isinstance(net, PreTrainedModel)
    steps = [step for step in get_model_conversion_mapping(net) or [] if isinstance(step, WeightRenaming)]

    def rename(name: str) -> str:
        for step in steps:
            name, _ = step.rename_source_key(name)
        return EXPERT_LEAF.sub(lambda match: f"{match[1]}{LETTERS[match[2]]}.", name)

    return rename


def spellings(name: str, net: nn.Module) -> tuple[str, ...]:
    """``name`` as it is, and with the base model's prefix added or taken away, as transformers reads both."""
    prefix = f"{getattr(net, 'base_model_prefix', '')}."
    return (name, name.removeprefix(prefix)) if name.startswith(prefix) else (name, prefix + name)


def _tensors(model: Model) -> Iterable[tuple[str, Piece | None, str]]:
    """Every tensor of ``model``, fused experts in pieces, as (name, piece, stored)."""
    shapes = {name: entry.info.shape for name, entry in model.entries.items()}
    for name, shape in shapes.items():
        if parse_fused(name, shape) is None:
            yield name, None, name
            continue
        for piece in unfuse(name, shapes, model.config):
            yield piece.name, piece, name
