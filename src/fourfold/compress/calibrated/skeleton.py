"""transformers' model of a configuration, without weights: layers get theirs one at a time.

The whole model is built on the meta device, so that its size costs nothing. ``enter`` puts the embeddings
and what else lies outside the decoder layers on the device for as long as it takes to turn token ids into the
first layer's inputs, and to see what the model would hand each layer besides (masks, rotary embeddings).
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fourfold.compress.calibrated.experts import separate_experts
from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.model import Model, plain
from fourfold.core.errors import FourfoldError

NUMBERED = re.compile(r"(^|\.)(layers|h|blocks)$")

# module names of transformers -> names in checkpoints, where they differ (conversion_mapping.py)
RENAMED = (
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
    (r"\.mlp\.", r".block_sparse_moe."),
    (r"^model\.", r"model.language_model."),
)


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
        separate_experts(self.layers)
        calibrate_linears(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, index: int) -> str:
        """The name of layer ``index`` in the checkpoint, e.g. ``model.layers.3``."""
        first, _ = next(iter(self.layers[index].named_parameters()))
        inside = f"{self.layers_name}.{index}"
        return logical_name(f"{inside}.{first}", self.model).removesuffix(f".{first}")

    def materialise(self, index: int) -> nn.Module:
        """A copy of layer ``index`` with its weights in float32 on the device."""
        layer = deepcopy(self.layers[index]).to_empty(device=self.device).eval()
        load_parameters(layer, f"{self.layers_name}.{index}.", self.model)
        return layer

    def logical_linears(self, index: int, layer: nn.Module) -> dict[str, CalibratedLinear]:
        """The linear layers of ``layer`` by their module names in the checkpoint."""
        inside = f"{self.layers_name}.{index}."
        return {
            logical_name(f"{inside}{name}.weight", self.model).removesuffix(".weight"): module
            for name, module in layer.named_modules()
            if isinstance(module, CalibratedLinear)
        }

    @torch.no_grad()
    def enter(self, batches: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], dict[int, list[Call]]]:
        """Token ids [B, T] -> the first layer's inputs [B, T, H], and by B what else each layer is handed."""
        outside = self._outside()
        inputs: list[torch.Tensor] = []
        calls: dict[int, list[Call]] = {}
        for token_ids in batches:
            seen: list[tuple[torch.Tensor, Call]] = []
            setattr(outside, self._leaf, nn.ModuleList(Catcher(layer, seen) for layer in self.layers))
            outside(input_ids=token_ids.to(self.device), use_cache=False)
            inputs.append(seen[0][0])
            calls.setdefault(len(token_ids), [call for _, call in seen])
        return inputs, calls

    @property
    def _leaf(self) -> str:
        return self.layers_name.rpartition(".")[2]

    def _outside(self) -> nn.Module:
        """The decoder around its layers, materialised."""
        owner = self.layers_name.rpartition(".")[0]
        decoder = self.net.get_submodule(owner)
        setattr(decoder, self._leaf, nn.ModuleList())
        decoder = deepcopy(decoder)
        setattr(self.net.get_submodule(owner), self._leaf, self.layers)
        prefix = owner + "."
        for name, module in list(decoder.named_modules()):
            if any(b is not None and b.is_meta for b in module.buffers(recurse=False)):
                _remake(decoder, name, self.device)
        for name, module in decoder.named_modules():
            for key, value in list(module.named_parameters(recurse=False)):
                full = f"{prefix}{name}.{key}" if name else f"{prefix}{key}"
                loaded = plain(self.model[logical_name(full, self.model)], torch.float32)
                setattr(module, key, nn.Parameter(loaded.to(self.device).view(value.shape), False))
        return decoder.eval()


class Catcher(nn.Module):
    """Stands for a decoder layer: keeps what it is handed and passes the hidden states on."""

    def __init__(self, layer: nn.Module, seen: list[tuple[torch.Tensor, Call]]):
        super().__init__()
        self._seen = (seen,)
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hidden states, unchanged."""
        (seen,) = self._seen
        seen.append((hidden_states, Call(args, kwargs)))
        return hidden_states


def build(config: dict[str, Any]) -> nn.Module:
    """transformers' causal language model of ``config`` on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
    settings.pop("quantization_config", None)
    model_type = settings.pop("model_type", None)
    try:
        parsed = AutoConfig.for_model(str(model_type), **settings)
        parsed._attn_implementation = "sdpa"
        parsed._experts_implementation = "eager"
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FourfoldError(
            f"transformers cannot build a causal language model of the type '{model_type}' "
            f"({' '.join(str(error).split())[:200]}). Passes with calibration need its modules: use a recipe "
            "without calibration (mxfp4), or a transformers that knows the type."
        ) from error


def find_layers(net: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the longest numbered list of modules."""
    lists = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.ModuleList) and NUMBERED.search(name) and "expert" not in name
    ]
    if not lists:
        raise FourfoldError(
            f"{type(net).__name__} has no list of decoder layers that Fourfold knows. Use a recipe without "
            "calibration (mxfp4)."
        )
    return max(lists, key=lambda item: sum(1 for _ in item[1].modules()))


def calibrate_linears(parent: nn.Module) -> None:
    """Turn every plain ``nn.Linear`` below ``parent`` into a CalibratedLinear; parameters stay."""
    for module in parent.modules():
        if type(module) is nn.Linear:
            module.__class__ = CalibratedLinear


def logical_name(name: str, model: Mapping[str, Any]) -> str:
    """The checkpoint's name of transformers' parameter ``name``. Raises FourfoldError when it has none."""
    tries = list(_names(name))
    for candidate in tries:
        if candidate in model:
            return candidate
    raise FourfoldError(
        f"transformers expects a parameter {name}, which the checkpoint does not hold (tried "
        f"{', '.join(tries)}). The folder is incomplete, or its names are not those of this architecture."
    )


def _names(name: str) -> Iterable[str]:
    seen = dict.fromkeys([name])
    for pattern, replacement in RENAMED:
        for known in list(seen):
            seen[re.sub(pattern, replacement, known)] = None
    return seen


def load_parameters(layer: nn.Module, prefix: str, model: Model) -> None:
    """Fill ``layer``'s parameters from ``model``, in float32."""
    for name, parameter in layer.named_parameters():
        value = plain(model[logical_name(prefix + name, model)], torch.float32)
        parameter.data.copy_(value.view(parameter.shape))
        parameter.requires_grad_(False)


def _remake(decoder: nn.Module, name: str, device: torch.device) -> None:
    """Build a module with computed buffers (rotary embeddings, scaled embeddings) anew on ``device``."""
    module = decoder.get_submodule(name)
    owner, _, leaf = name.rpartition(".")
    parent = decoder.get_submodule(owner)
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "scalar_embed_scale", None)
        if scale is not None:
            module.register_buffer("embed_scale", torch.tensor(scale, device=device), persistent=False)
            return
    try:
        with torch.device(device):
            setattr(parent, leaf, type(module)(config=decoder.config))
    except TypeError as error:
        raise FourfoldError(
            f"{name} of {type(decoder).__name__} computes buffers in a way that Fourfold cannot repeat "
            f"({error}). Use a recipe without calibration (mxfp4)."
        ) from error
