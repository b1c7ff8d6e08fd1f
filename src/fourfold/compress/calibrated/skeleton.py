"""transformers' model of a configuration, without weights: layers get theirs one at a time.

The whole model is built on the meta device, so that its size costs nothing. ``enter`` puts the embeddings
and what else lies outside the decoder layers on the device for as long as it takes to turn token ids into the
first layer's inputs, and to see what the model would hand each layer besides (masks, rotary embeddings).
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fourfold.compress.calibrated.building import build, find_layers, make_buffers
from fourfold.compress.calibrated.experts import parameters_apart, separate_experts
from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.names import Names
from fourfold.compress.model import Model
from fourfold.core.errors import FourfoldError


@dataclass(frozen=True)
class Call:
    """What the model hands a decoder layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Skeleton:
    """The decoder of ``model`` (resolved, unrounded) for calibration on ``device``; computes in float32.

    Raises FourfoldError for a configuration that transformers cannot build, or without decoder layers.
    """

    def __init__(self, model: Model, device: torch.device):
        self.model, self.device = model, device
        self.net = build(model.config)
        self.layers_name, self.layers = find_layers(self.net)
        self.names = Names(self.net, model)
        for name in sorted(parameters_apart(self.layers)):
            if not self._computed(f"{self.layers_name}.{name}"):
                self.names[f"{self.layers_name}.{name}"]

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, index: int) -> str:
        """The name of layer ``index`` in the checkpoint, e.g. ``model.layers.3``."""
        first, _ = next(iter(self.layers[index].named_parameters()))
        return self.names[f"{self.inside(index)}{first}"].name.removesuffix(f".{first}")

    def inside(self, index: int) -> str:
        """What the names of layer ``index``'s parameters begin with in ``net``."""
        return f"{self.layers_name}.{index}."

    def materialise(self, index: int) -> nn.Module:
        """A copy of layer ``index``, experts apart, with its weights in float32 on the device."""
        layer = deepcopy(self.layers[index])
        separate_experts(layer)
        calibrate_linears(layer)
        return self._fill(layer, self.inside(index))

    def logical_linears(self, index: int, layer: nn.Module) -> dict[str, CalibratedLinear]:
        """The linear layers of ``layer`` by their module names in the checkpoint."""
        return {
            self.names[f"{self.inside(index)}{name}.weight"].name.removesuffix(".weight"): module
            for name, module in layer.named_modules()
            if isinstance(module, CalibratedLinear)
        }

    def linear_weights(self) -> set[str]:
        """The checkpoint's names of what decoder layers hold, without matrices that are no linear layer's:
        transformers multiplies with a router's as with a parameter.
        """
        found = self.names.held(self.layers_name)
        for name, parameter in self.layers.named_parameters():
            inside, owner = f"{self.layers_name}.{name}", self.layers.get_submodule(name.rpartition(".")[0])
            if parameter.ndim == 2 and type(owner) is not nn.Linear and inside in self.names:
                found.discard(self.names[inside].name)
        return found

    @torch.no_grad()
    def enter(self, batches: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], dict[int, list[Call]]]:
        """Token ids [B, T] -> the first layer's inputs [B, T, H], and by B what else each layer is handed."""
        outside = self.outside()
        inputs: list[torch.Tensor] = []
        calls: dict[int, list[Call]] = {}
        for token_ids in batches:
            seen: list[tuple[torch.Tensor, Call]] = []
            setattr(outside, self._leaf, nn.ModuleList(Catcher(layer, seen) for layer in self.layers))
            try:
                outside(input_ids=token_ids.to(self.device), use_cache=False)
            except (TypeError, ValueError) as error:
                raise FourfoldError(
                    f"{type(self.net).__name__} takes more from its layers than hidden states ({error}). Use "
                    "a recipe without calibration (mxfp4)."
                ) from error
            inputs.append(seen[0][0])
            handed = [call for _, call in seen]
            if not alike(calls.setdefault(len(token_ids), handed)[0], handed[0]):
                raise FourfoldError(
                    f"{type(self.net).__name__} hands its layers something that depends on the tokens "
                    "besides the hidden states. Use a recipe without calibration (mxfp4)."
                )
        return inputs, calls

    @property
    def _leaf(self) -> str:
        return self.layers_name.rpartition(".")[2]

    def outside(self) -> nn.Module:
        """The decoder around its layers, materialised."""
        owner = self.layers_name.rpartition(".")[0]
        decoder = self.net.get_submodule(owner)
        setattr(decoder, self._leaf, nn.ModuleList())
        try:
            outside = deepcopy(decoder)
        finally:
            setattr(decoder, self._leaf, self.layers)
        return self._fill(outside, f"{owner}.")

    def _fill(self, part: nn.Module, inside: str) -> nn.Module:
        """Bring ``part`` from the meta device to the device, with the checkpoint's values in float32."""
        # as `to_empty`, for which torch would import its symbolic shapes
        part = part._apply(self._empty).eval()
        make_buffers(part, self.net.get_submodule(self.layers_name.rpartition(".")[0]))
        held = part.state_dict(keep_vars=True)
        for name, value in self.names.values(inside + n for n in held if not self._computed(inside + n)):
            target = held[name.removeprefix(inside)]
            target.data.copy_(value.view(target.shape))
        for name, buffer in part.named_buffers():
            if buffer.isnan().any():
                raise FourfoldError(
                    f"transformers computes {inside}{name} in a way that Fourfold cannot repeat. Use a "
                    "recipe without calibration (mxfp4)."
                )
        return part.requires_grad_(False)

    def _empty(self, t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device)

    def _computed(self, parameter: str) -> bool:
        """Whether it is a buffer that this checkpoint leaves for transformers to compute."""
        if parameter in self.names:
            return False
        owner, _, leaf = parameter.rpartition(".")
        try:
            return leaf in self.net.get_submodule(owner)._buffers
        except AttributeError:
            return False


def alike(first: Any, second: Any) -> bool:
    """Whether all tensors in two calls (or tuples, lists, maps of such) are equal."""
    if isinstance(first, Call):
        return alike((first.args, first.kwargs), (second.args, second.kwargs))
    if isinstance(first, torch.Tensor):
        return first is second or torch.equal(first, second)
    if isinstance(first, dict):
        return all(alike(value, second[key]) for key, value in first.items())
    if isinstance(first, (tuple, list)):
        return all(alike(a, b) for a, b in zip(first, second, strict=True))
    return True


class Catcher(nn.Module):
    """Stands for a decoder layer: keeps what it is handed and passes the hidden states on."""

    def __init__(self, layer: nn.Module, seen: list[tuple[torch.Tensor, Call]]):
        super().__init__()
        self._seen = (seen,)
        for name, value in vars(layer).items():  # the decoder may ask a layer for its kind of attention
            if isinstance(value, (str, int)) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hidden states, unchanged."""
        (seen,) = self._seen
        seen.append((hidden_states, Call(args, kwargs)))
        return hidden_states


def calibrate_linears(parent: nn.Module) -> None:
    """Turn every plain ``nn.Linear`` below ``parent`` into a CalibratedLinear; parameters stay."""
    for module in parent.modules():
        if type(module) is nn.Linear:
            module.__class__ = CalibratedLinear
