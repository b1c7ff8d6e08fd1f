"""From a checkpoint's tensors to layers: checked, fused where inputs are shared, blocks kept packed."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fourfold.checkpoint import Checkpoint
from fourfold.core.errors import FourfoldError
from fourfold.engine.layers import FusedLinear, Linear, RMSNorm, Unread
from fourfold.formats import ROTATION_SIZE, BlockTensor, hadamard
from fourfold.kernels import Weight
from fourfold.kernels.cpu.packed import PackedWeight

WHOLE_TENSOR_SCALES = ("nvfp4", "fp8-tensor")
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Weights:
    """A checkpoint seen as layers of one dtype. Matrices that are not quantized are cast to ``dtype``."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype):
        self.checkpoint, self.dtype = checkpoint, dtype
        self._names = set(checkpoint.names())
        self.unread: list[Linear] = []

    def has(self, name: str) -> bool:
        """Whether the checkpoint has the parameter ``name``."""
        return name in self._names

    def format(self, name: str) -> str | None:
        """The block format of the parameter ``name``; None when it is plain, or missing."""
        return self.checkpoint.info(name).format if name in self._names else None

    def is_packed(self, name: str) -> bool:
        """Whether the checkpoint has the parameter ``name``, and in blocks."""
        return self.format(name) is not None

    def raw(self, name: str, shape: tuple[int, ...]) -> Tensor | BlockTensor:
        """A parameter in blocks as held, or in the engine's dtype; raises as ``held`` does."""
        return self.cast(self.held(name, shape))

    def cast(self, value: Tensor | BlockTensor) -> Tensor | BlockTensor:
        """``value`` in the engine's dtype, unless it is in blocks."""
        return value if isinstance(value, BlockTensor) else value.to(self.dtype)

    def held(self, name: str, shape: tuple[int, ...]) -> Tensor | BlockTensor:
        """A parameter as held, mapped where it can be: what is never touched is never read.

        Raises FourfoldError when missing, not of ``shape`` or not a plain float.
        """
        if name not in self._names:
            raise FourfoldError(
                f"{self.checkpoint.source} has no tensor '{name}', which its config's architecture needs. "
                "The checkpoint is incomplete or its config.json belongs to another model; fetch it again."
            )
        value = self.checkpoint.mapped(name)
        if tuple(value.shape) != shape:
            raise FourfoldError(
                f"Tensor '{name}' of {self.checkpoint.source} has shape {list(value.shape)}, but "
                f"its config.json says {list(shape)}. The config is of another model, or one is damaged."
            )
        if isinstance(value, Tensor) and value.dtype not in PLAIN_DTYPES:
            raise FourfoldError(
                f"Tensor '{name}' of {self.checkpoint.source} is {str(value.dtype).removeprefix('torch.')}, "
                "which means nothing without scales that its config.json does not describe; the engine takes "
                "bfloat16, float16, float32 and float64. Use the original model, or restore its config.json."
            )
        return value

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter as a plain tensor of the engine's dtype, dequantized if it is held in blocks."""
        value = self.raw(name, shape)
        return value.dequantize(self.dtype) if isinstance(value, BlockTensor) else value

    def values(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter in float32 whatever the engine's dtype: norms, biases and routers, which are small."""
        value = self.held(name, shape)
        return value.dequantize() if isinstance(value, BlockTensor) else value.float()

    def norm(self, module: str, size: int, eps: float, offset: float = 0.0) -> RMSNorm:
        """The RMSNorm ``module`` over ``size`` features, whose weights are ``offset`` more than is stored."""
        return RMSNorm(self.values(f"{module}.weight", (size,)) + offset, eps, self.dtype)

    def linear(self, module: str, out_features: int, in_features: int, bias: bool = False) -> Linear:
        """The linear layer ``module``, its weight [out, in] as held and its scheme's activation format."""
        name, shape = f"{module}.weight", (out_features, in_features)
        offset = self.values(f"{module}.bias", (out_features,)) if bias else None
        linear = Linear(
            Unread(name, shape, self.format(name), lambda: self.raw(name, shape)),
            offset,
            self.activation(module),
            self.rotation(module),
            self.feedback(module),
        )
        self.unread.append(linear)
        return linear

    def pack_all(self, input_parts: int) -> None:
        """Read every weight that has not been, and pack it; ``input_parts`` as in PackedWeight.

        Raises FourfoldError as ``held`` does.
        """
        for linear in self.unread:
            linear.pack()
            if isinstance(linear.weight, PackedWeight):
                linear.weight = replace(linear.weight, input_parts=input_parts)
        self.unread.clear()

    def activation(self, module: str) -> str | None:
        """The format that inputs of ``module`` are rounded to, or None."""
        scheme = self.checkpoint.quantization.layer(module)
        return scheme.activation if scheme else None

    def feedback(self, module: str) -> int | None:
        """The groups in which inputs of ``module`` are rounded with feedback, or None."""
        scheme = self.checkpoint.quantization.layer(module)
        return scheme.input_feedback if scheme else None

    def rotation(self, module: str) -> Tensor | None:
        """What the inputs of ``module`` are turned by, float32 [32, 32], or None."""
        scheme = self.checkpoint.quantization.layer(module)
        if scheme is None or scheme.input_transform is None:
            return None
        if scheme.input_transform == "hadamard":
            return hadamard()
        name, shape = f"{module}.input_rotation", (ROTATION_SIZE, ROTATION_SIZE)
        rotation = self.held(name, shape)
        assert isinstance(rotation, Tensor), "dialects store rotations as they are"
        return rotation.float()

    def fused(
        self, prefix: str, outs: dict[str, int], in_features: int, bias: bool = False
    ) -> Linear | FusedLinear:
        """Layers ``prefix`` + name of one input, rows one after the other, as one weight where possible."""
        parts = [self.linear(prefix + name, size, in_features, bias) for name, size in outs.items()]
        if not self._may_fuse(prefix, outs) or len({part.activation for part in parts}) > 1:
            return FusedLinear(parts)
        if not same_rotation(parts) or any(part.feedback for part in parts):
            return FusedLinear(parts)
        offsets = [part.bias for part in parts if part.bias is not None]
        weight = Unread(
            f"{prefix}{'+'.join(outs)}.weight",
            (sum(outs.values()), in_features),
            parts[0].format,
            lambda: concatenate([part.weight for part in parts]),
            tuple(parts),
        )
        fused = Linear(
            weight, torch.cat(offsets) if offsets else None, parts[0].activation, parts[0].rotation
        )
        self.unread[-len(parts) :] = [fused]
        return fused

    def _may_fuse(self, prefix: str, names: Iterable[str]) -> bool:
        """Whether all layers ``prefix`` + name are held alike, and none under a scale of the whole tensor."""
        held = [f"{prefix}{name}.weight" for name in names]
        forms = {self.format(name) for name in held if name in self._names}
        return len(forms) <= 1 and forms.isdisjoint(WHOLE_TENSOR_SCALES)


def same_rotation(parts: list[Linear]) -> bool:
    """Whether all of ``parts`` turn their input alike."""
    given = [part.rotation for part in parts if part.rotation is not None]
    return not given or (len(given) == len(parts) and all(torch.equal(given[0], r) for r in given))


def concatenate(weights: Sequence[Weight]) -> Tensor | BlockTensor:
    """Weights [n_i, K], all held alike, as one [sum n_i, K]."""
    packed = [w for w in weights if isinstance(w, BlockTensor)]
    if not packed:
        return torch.cat([w for w in weights if isinstance(w, Tensor)])
    rules = {w.scale_rule for w in packed}
    return BlockTensor(
        packed[0].format,
        torch.cat([w.blocks for w in packed]),
        torch.cat([w.scales for w in packed]),
        rules.pop() if len(rules) == 1 else None,
    )
