"""The linear layer that calibration runs: an ``nn.Linear`` that computes as the served model will.

On its way in, the input is turned (``rotation``) and then rounded (``activation``, with feedback where
``feedback_group`` is given), as the checkpoint will ask of the engine. While a layer is worked on,
``rounds_input`` is off, ``observer`` sees every input, and ``recall`` may have the output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fourfold.compress.calibrated.recall import Recall
from fourfold.core.quantization import LayerScheme
from fourfold.formats import BlockFormat, get_format, turn
from fourfold.kernels.feedback import InputFeedback

Observer = Callable[[torch.Tensor], None]


class CalibratedLinear(nn.Linear):
    """``rotation`` [32, 32] multiplies every run of 32 inputs from the right; the weight is turned too."""

    rotation: torch.Tensor | None = None
    activation: BlockFormat | None = None
    rounds_input: bool = False
    observer: Observer | None = None
    recall: Recall | None = None
    feedback_group: int | None = None
    _feedback: InputFeedback | None = None

    def round_as(self, scheme: LayerScheme) -> None:
        """Inputs are those of ``scheme`` when they are rounded."""
        self.activation = get_format(scheme.activation) if scheme.activation else None
        self.feedback_group, self._feedback = scheme.input_feedback, None

    def refresh_feedback(self) -> None:
        """Feedback for the weight as it is, in the same memory: whoever trains it asks now and then."""
        if self.feedback_group is None or self.activation is None:
            return
        if self._feedback is None:
            self._feedback = InputFeedback(self.weight, self.activation.name, self.feedback_group)
        else:
            self._feedback.update(self.weight)

    def weight_changed(self) -> None:
        """The weight is another one: feedback for it is made when it is needed."""
        self._feedback = None

    def reset_parameters(self) -> None:
        """Nothing: values come from a checkpoint, and on the meta device torch would import its compiler."""

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in] as the weight expects it, before it is rounded."""
        return x if self.rotation is None else turn(x, self.rotation)

    def as_served(self, turned: torch.Tensor) -> torch.Tensor:
        """A turned input in the values that the served model multiplies; gradients pass straight through."""
        if self.activation is None:
            return turned
        rounded = self._nearest(turned, self.activation)
        return straight_through(turned, rounded) if turned.requires_grad else rounded

    def _nearest(self, x: torch.Tensor, activation: BlockFormat) -> torch.Tensor:
        if self.feedback_group is None:
            return activation.fake_quantize(x)
        if self._feedback is None:
            self.refresh_feedback()
        assert self._feedback is not None
        return self._feedback(x)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        x = self.turned(input)
        if self.observer is not None:
            self.observer(x.detach().reshape(-1, x.shape[-1]))
        if self.rounds_input:
            x = self.as_served(x)
        return F.linear(x, self.weight, self.bias) if self.recall is None else self.recall(self, x)


class StraightThrough(torch.autograd.Function):
    """Forward: the second argument. Backward: as if it were the first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        """``rounded``."""
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient, to ``x``."""
        return grads[0], None


def straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, whose gradient goes to ``x`` as if it were that (Bengio et al., arXiv:1308.3432)."""
    result = StraightThrough.apply(x, rounded)
    assert isinstance(result, torch.Tensor)
    return result
