"""The whole model in memory, with gradients: for what is learned on the original model's logits.

Everything is in float32 on the skeleton's device: 4 bytes a parameter, and what a backward pass keeps. That
is for models that fit; the layer loop is for those that do not.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.names import check_numbers
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.model import plain
from fourfold.core.errors import FourfoldError


class WholeModel:
    """All layers of ``skeleton``'s model around its embeddings and its head, none of them rounded.

    ``layers`` are the decoder layers, ``linears`` their linear layers by module name in the checkpoint,
    ``schemes`` those that are to be rounded. Parameters do not require gradients until asked to. Raises
    FourfoldError when the head's weight is nowhere to be found.
    """

    def __init__(self, skeleton: Skeleton):
        self.device = skeleton.device
        layers = [skeleton.materialise(index) for index in range(len(skeleton))]
        self.layers = nn.ModuleList(layers)
        self.linears: dict[str, CalibratedLinear] = {}
        for index, layer in enumerate(layers):
            self.linears |= skeleton.logical_linears(index, layer)
        known = skeleton.model.quantization.layers
        self.schemes = {name: known[name] for name in self.linears if name in known}
        self.net = _net_around(skeleton, self.layers)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocabulary] in float32 of token ids [B, T]; bfloat16 products on a GPU."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.net(input_ids=token_ids.to(self.device), use_cache=False).logits.float()

    def round_inputs(self) -> None:
        """From now on inputs are rounded as the served model rounds them."""
        for name, scheme in self.schemes.items():
            self.linears[name].round_as(scheme)
            self.linears[name].rounds_input = True

    @torch.no_grad()
    def observe(self, see: Callable[[str, torch.Tensor], None], batches: Iterable[torch.Tensor]) -> None:
        """Run the model over ``batches`` of token ids; ``see(name, x)`` gets the turned input [n, in] of each
        linear layer of the scheme, before rounding.
        """
        for name in self.schemes:
            self.linears[name].observer = lambda x, name=name: see(name, x)
        try:
            for token_ids in batches:
                self(token_ids)
        finally:
            for name in self.schemes:
                self.linears[name].observer = None


def divergence_of(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(wanted || found) of logits [B, T, V] in nats, the mean over all positions."""
    logs = F.log_softmax(found, -1), F.log_softmax(wanted, -1)
    return F.kl_div(*logs, log_target=True, reduction="sum") / wanted[..., 0].numel()


def _net_around(skeleton: Skeleton, layers: nn.ModuleList) -> nn.Module:
    """transformers' model with ``layers`` in it; of the rest only what text goes through is materialised."""
    owner, _, leaf = skeleton.layers_name.rpartition(".")
    decoder = skeleton.outside()
    setattr(decoder, leaf, layers)
    net = deepcopy(skeleton.net).eval()
    net.set_submodule(owner, decoder)
    head = net.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    head.weight = nn.Parameter(_head_weight(skeleton, net, head), False)
    if head.bias is not None:
        head.bias = nn.Parameter(_stored(skeleton, f"{_name_of(net, head)}.bias"), False)
    return net


def _head_weight(skeleton: Skeleton, net: nn.Module, head: nn.Module) -> torch.Tensor:
    name = f"{_name_of(net, head)}.weight"
    if name in skeleton.model:
        return _stored(skeleton, name)
    if getattr(net.config, "tie_word_embeddings", False):
        return net.get_input_embeddings().weight.data  # pyright: ignore
    raise FourfoldError(
        f"The model has no {name}, and its embeddings are not said to be tied to it. Without its head "
        "there are no logits to compare: choose a pass that works layer by layer (gptq, autoround)."
    )


def _stored(skeleton: Skeleton, name: str) -> torch.Tensor:
    value = skeleton.model[name]
    check_numbers(name, value)
    return plain(value, torch.float32).to(skeleton.device)


def _name_of(net: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in net.named_modules() if other is module)
