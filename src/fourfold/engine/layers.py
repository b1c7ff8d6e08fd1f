"""The pieces that model architectures are made of. All take and return rows of tokens: [T, features]."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.formats import BlockTensor
from fourfold.kernels import Weight, linear, pack, rotate
from fourfold.kernels.feedback import InputFeedback


@dataclass(frozen=True, slots=True, eq=False)
class Unread:
    """A weight [out, in] in blocks of ``format`` (None: plain) that ``read`` fetches when it is needed.

    ``name`` is the checkpoint's, of all its parts where it is put together: then ``pieces`` are the layers
    whose rows it has, one after the other.
    """

    name: str
    shape: tuple[int, int]
    format: str | None
    read: Callable[[], Tensor | BlockTensor]
    pieces: "tuple[Linear, ...]" = ()


class Linear:
    """x W^T + b with W [out, in] as it is held: a plain tensor, blocks that stay blocks, or packed tiles.

    As the checkpoint's scheme says, x is first turned by ``rotation`` (float32 [32, 32], blockwise), and then
    rounded to the format ``activation``, with feedback inside groups of ``feedback`` values where given.
    """

    __slots__ = ("_rounding", "_weight", "activation", "bias", "feedback", "rotation")

    def __init__(
        self,
        weight: Weight | Unread,
        bias: Tensor | None = None,
        activation: str | None = None,
        rotation: Tensor | None = None,
        feedback: int | None = None,
    ):
        self._weight, self.bias, self.activation, self.rotation = weight, bias, activation, rotation
        self.feedback = feedback
        self._rounding: InputFeedback | None = None

    @property
    def weight(self) -> Weight:
        """W; read now, if it was not."""
        if isinstance(self._weight, Unread):
            self._weight = self._weight.read()
        return self._weight

    @weight.setter
    def weight(self, weight: Weight) -> None:
        self._weight = weight

    def pack(self) -> None:
        """Hold W as torch's path is fastest with it, and of it only what its inputs are rounded by."""
        if self.feedback is not None and self.activation is not None:
            weight = self.weight
            values = weight.dequantize() if isinstance(weight, BlockTensor) else weight
            assert isinstance(values, Tensor), "not packed yet"
            self._rounding = InputFeedback(values, self.activation, self.feedback)
        self.weight = pack(self.weight)

    @property
    def name(self) -> str | None:
        """What the checkpoint calls W, as long as that is not read."""
        return self._weight.name if isinstance(self._weight, Unread) else None

    @property
    def parts(self) -> "tuple[Linear]":
        """The layer itself, where a FusedLinear has several."""
        return (self,)

    @property
    def pieces(self) -> "tuple[Linear, ...]":
        """Layers whose rows, one after the other, are those of W; the layer itself if W is in one piece."""
        return (isinstance(self._weight, Unread) and self._weight.pieces) or (self,)

    @property
    def format(self) -> str | None:
        """The block format of W, None when it is plain or packed; nothing is read."""
        return self._weight.format if isinstance(self._weight, Unread | BlockTensor) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]; nothing is read."""
        return tuple(self._weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out]."""
        if self.rotation is not None:
            x = rotate(x, self.rotation)
        if self._rounding is not None:
            y = linear(self._rounding(x), self.weight)
        else:
            y = linear(x, self.weight, self.activation)
        return y if self.bias is None else y.add_(self.bias)


class FusedLinear:
    """Several linear layers of one input, outputs side by side: parts that could not become one weight."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[Linear]):
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., sum of out]."""
        return torch.cat([part(x) for part in self.parts], -1)


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; float32 sums, ``dtype`` out.

    Computed as x * (weight sqrt(n)) / hypot(|x|, sqrt(n eps)) for n features: fewer and cheaper steps than
    torch's rms_norm has on a CPU, where it is put together from eight.
    """

    __slots__ = ("dtype", "floor", "weight")

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype):
        self.weight, self.dtype = weight.float() * len(weight) ** 0.5, dtype
        self.floor = torch.tensor((len(weight) * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        """X [..., size] -> the same shape."""
        x = x.float()
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * self.weight).div_(length.hypot_(self.floor)).to(self.dtype)


@dataclass(frozen=True, slots=True)
class Gating:
    """What an MLP makes of gate and up: act(gate) * up with ``kind`` silu or gelu-tanh.

    ``clamped-swish`` is gpt-oss's: g sigmoid(alpha g) (u + 1), with g = min(gate, limit) and u = up within
    +-limit.
    """

    kind: Literal["silu", "gelu-tanh", "clamped-swish"] = "silu"
    alpha: float = 1.0
    limit: float = math.inf

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Gate and up [T, I] -> [T, I]."""
        if self.kind == "silu":
            return F.silu(gate).mul_(up)
        if self.kind == "gelu-tanh":
            return F.gelu(gate, approximate="tanh").mul_(up)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate.mul_((gate * self.alpha).sigmoid_()).mul_(up.add_(1))


class GatedMLP:
    """down(gating(gate(x), up(x))), gate and up computed as one, gate's rows first."""

    __slots__ = ("down", "gate_up", "gating")

    def __init__(self, gate_up: Linear | FusedLinear, down: Linear, gating: Gating):
        self.gate_up, self.down, self.gating = gate_up, down, gating

    def __call__(self, x: Tensor) -> Tensor:
        """X [T, hidden] -> [T, hidden]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.gating(gate, up))
