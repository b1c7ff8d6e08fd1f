"""The linear layer that calibration runs: an ``nn.Linear`` that computes as the served model will.

On its way in, the input is turned (``rotation``) and then rounded (``activation``), as the checkpoint will
ask of the engine. While a layer is worked on, ``rounds_input`` is off and ``observer`` sees every input.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from fourfold.formats import BlockFormat, turn

Observer = Callable[[torch.Tensor], None]


class CalibratedLinear(nn.Linear):
    """``rotation`` [32, 32] multiplies every run of 32 inputs from the right; the weight holds its inverse."""

    rotation: torch.Tensor | None = None
    activation: BlockFormat | None = None
    rounds_input: bool = False
    observer: Observer | None = None

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in] as the weight expects it, before it is rounded."""
        return x if self.rotation is None else turn(x, self.rotation)

    def as_served(self, turned: torch.Tensor) -> torch.Tensor:
        """A turned input in the values that the served model multiplies."""
        return turned if self.activation is None else self.activation.fake_quantize(turned)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        x = self.turned(input)
        if self.observer is not None:
            self.observer(x.detach().reshape(-1, x.shape[-1]))
        if self.rounds_input:
            x = self.as_served(x)
        return F.linear(x, self.weight, self.bias)
