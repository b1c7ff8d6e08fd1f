"""Weights that are trained through their rounding: float32 latents, whose rounded values the layers hold.

The latents of all linear layers lie in one tensor, side by side, and so do their rounded values and their
gradients, of which each layer's weight is a window: rounding, and a step of an optimiser, are a few
operations over everything instead of some dozens for every layer. The gradient goes straight through the
rounding (Bengio et al., arXiv:1308.3432), and block scales follow the latents by the scheme's own rule.

The price is 12 bytes for each weight, beside what the optimiser keeps.
"""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn

from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.core.quantization import LayerScheme
from fourfold.formats import BlockTensor, get_format


class Window(NamedTuple):
    """Where the weight of one layer lies, and how it is to be held."""

    begin: int
    end: int
    shape: torch.Size
    scheme: LayerScheme

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """[out, in], without a copy."""
        return flat[self.begin : self.end].view(self.shape)


class Latents:
    """The weights of ``linears`` with ``schemes``, by name, starting as they are.

    ``values`` is what an optimiser steps on; its ``grad`` is filled by backward passes through the layers,
    and stays allocated: zero it, do not drop it.
    """

    def __init__(self, linears: dict[str, CalibratedLinear], schemes: dict[str, LayerScheme]):
        weights = {name: linears[name].weight.detach().float() for name in schemes}
        self.values = torch.cat([weight.flatten() for weight in weights.values()])
        self.rounded = self.values.clone()
        self.values.grad = torch.zeros_like(self.values)
        self.windows: dict[str, Window] = {}
        begin = 0
        for name, weight in weights.items():
            end = begin + weight.numel()
            self.windows[name] = window = Window(begin, end, weight.shape, schemes[name])
            linears[name].weight = nn.Parameter(window.of(self.rounded))
            linears[name].weight.grad = window.of(self.values.grad)
            begin = end

    @torch.no_grad()
    def write(self) -> None:
        """Let the layers compute with the rounded latents of this moment."""
        for form, rule, windows in self._alike():
            begin, end = windows[0].begin, windows[-1].end
            width = form.block_size or windows[0].shape[-1]
            runs = self.values[begin:end].view(-1, width)
            self.rounded[begin:end] = form.fake_quantize(runs, rule).flatten()

    def blocks(self, name: str) -> BlockTensor:
        """The rounded weight of ``name`` as it is stored."""
        window = self.windows[name]
        form = get_format(window.scheme.weight)
        return form.quantize(window.of(self.values), window.scheme.scale_rule)

    def _alike(self):
        """(format, rule, windows that can be rounded at once): all neighbours whose blocks know no others."""

        def key(place: tuple[int, Window]) -> tuple[str, str | None, int]:
            index, window = place
            alone = get_format(window.scheme.weight).scale != "e8m0"
            return window.scheme.weight, window.scheme.scale_rule, index if alone else -1

        for (name, rule, _), group in groupby(enumerate(self.windows.values()), key):
            yield get_format(name), rule, [window for _, window in group]
