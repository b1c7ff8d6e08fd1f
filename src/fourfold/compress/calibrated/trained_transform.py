"""A whole model whose inputs are divided and turned by trained numbers, before everything is rounded.

For each distinct input an orthogonal R = H exp(A - A^T), with H the Hadamard matrix and A [32, 32] starting
at zero; for each group of :mod:`groups` a scale s = exp(a) of each channel, a starting at zero. A linear
layer computes Q((x / s) R) Q(W s R)^T, which is x W^T but for the rounding Q. Gradients go straight through
Q, so that what they tell about R and s is only what rounding makes of them.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fourfold.checkpoint.rotations import INPUT_ROTATION, fused_name
from fourfold.compress.calibrated.folding import norm_offset, preserved
from fourfold.compress.calibrated.groups import Group, Trace, find_groups, scale_reader, scale_source
from fourfold.compress.calibrated.linear import CalibratedLinear, straight_through
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibrated.whole import WholeModel
from fourfold.compress.calibrated.work import LayerWork
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import LayerScheme
from fourfold.formats import ROTATION_SIZE, get_format, hadamard

SCALES = ".smoothing"
PROBED_TOKENS = 512


class TransformedLinear(CalibratedLinear):
    """A linear layer that computes as the served one will while ``active``, and as the original otherwise.

    ``divide`` [in] divides the input, ``widen`` [in] multiplies the weight's columns, ``narrow`` [out]
    divides its rows.
    """

    active: bool = False
    scheme: LayerScheme
    divide: torch.Tensor | None = None
    widen: torch.Tensor | None = None
    narrow: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if not self.active:
            return F.linear(input, self.weight, self.bias)
        x = input if self.divide is None else input / self.divide
        bias = self.bias if self.bias is None or self.narrow is None else self.bias / self.narrow
        return F.linear(self.as_served(self.turned(x)), self._rounded_weight(), bias)

    def _rounded_weight(self) -> torch.Tensor:
        weight = self.weight if self.narrow is None else self.weight / self.narrow[:, None]
        weight = self.turned(weight if self.widen is None else weight * self.widen)
        rounded = get_format(self.scheme.weight).fake_quantize(weight.detach(), self.scheme.scale_rule)
        return straight_through(weight, rounded) if weight.requires_grad else rounded


class TrainedTransform:
    """``model`` with its transforms: ``angles`` float32 [inputs, 32, 32] and ``log_scales`` by group.

    Groups whose members are not all rounded are not scaled: what is stored in bfloat16 would have to be
    rounded again.
    """

    def __init__(self, skeleton: Skeleton, token_ids: torch.Tensor, *, smoothing: bool):
        self.model = WholeModel(skeleton)
        self._groups = list(self._find_groups(skeleton, token_ids))
        self._inputs = self._find_inputs()
        for name, scheme in self.model.schemes.items():
            linear = self.model.linears[name]
            linear.__class__ = TransformedLinear
            linear.round_as(scheme.model_copy(update={"input_feedback": None}))
            assert isinstance(linear, TransformedLinear)
            linear.scheme, linear.rounds_input = scheme, True
        for layer in self.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        device = self.model.device
        self.start = hadamard().to(device)
        self.angles = torch.zeros(len(self._inputs), ROTATION_SIZE, ROTATION_SIZE, device=device)
        self.log_scales = {
            f"{prefix}:{group.source}": torch.zeros(group.channels, device=device)
            for prefix, group, layer in self._groups
            if smoothing and self._may_scale(layer, group)
        }
        for parameter in (self.angles, *self.log_scales.values()):
            parameter.requires_grad_(True)

    def logits(self, token_ids: torch.Tensor, *, served: bool) -> torch.Tensor:
        """Logits [B, T, vocabulary] of the rounded model with its transforms, or of the original one."""
        for linear in self._linears():
            linear.active = served
        if served:
            self._hand_out()
        return self.model(token_ids)

    @torch.no_grad()
    def learned(self) -> dict[str, torch.Tensor]:
        """The matrices by ``<module>.input_rotation``, the scales by ``<layer>:<source>.smoothing``."""
        rotations = self._rotations(torch.float64)
        found = {
            name + INPUT_ROTATION: storable(rotation.float().cpu())
            for names, rotation in zip(self._inputs, rotations, strict=True)
            for name in names
        }
        return found | {key + SCALES: log.exp() for key, log in self.log_scales.items()}

    def _rotations(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        skew = (self.angles - self.angles.mT).to(dtype)
        return self.start.to(dtype) @ torch.matrix_exp(skew)

    def _hand_out(self) -> None:
        for names, rotation in zip(self._inputs, self._rotations(), strict=True):
            for name in names:
                self.model.linears[name].rotation = rotation
        for prefix, group, layer in self._groups:
            log = self.log_scales.get(f"{prefix}:{group.source}")
            if log is None:
                continue
            scales = log.exp()
            source = layer.get_submodule(group.source)
            is_linear = isinstance(source, TransformedLinear)
            if is_linear:
                source.narrow = scales
            wide = scales[group.spread.to(scales.device)]
            for reader in map(layer.get_submodule, group.readers):
                assert isinstance(reader, TransformedLinear)
                reader.widen, reader.divide = wide, None if is_linear else wide

    def _linears(self) -> Iterable[TransformedLinear]:
        for name in self.model.schemes:
            linear = self.model.linears[name]
            assert isinstance(linear, TransformedLinear)
            yield linear

    def _find_inputs(self) -> list[list[str]]:
        """The rotated linear layers by the input that they share: behind one norm, or computed as one."""
        norm_of = {
            id(layer.get_submodule(reader)): f"{prefix}:{group.source}"
            for prefix, group, layer in self._groups
            for reader in group.readers
            if not isinstance(layer.get_submodule(group.source), nn.Linear)
        }
        found: dict[str, list[str]] = {}
        for name, scheme in self.model.schemes.items():
            if scheme.input_transform == "trained":
                key = norm_of.get(id(self.model.linears[name]), fused_name(name))
                found.setdefault(key, []).append(name)
        return list(found.values())

    def _may_scale(self, layer: nn.Module, group: Group) -> bool:
        members = [layer.get_submodule(name) for name in group.readers]
        source = layer.get_submodule(group.source)
        members += [source] if isinstance(source, nn.Linear) else []
        return all(isinstance(member, TransformedLinear) for member in members)

    @torch.no_grad()
    def _find_groups(
        self, skeleton: Skeleton, token_ids: torch.Tensor
    ) -> Iterable[tuple[str, Group, nn.Module]]:
        few = token_ids[:1, :PROBED_TOKENS]
        inputs, calls = skeleton.enter([few])
        for index, layer in enumerate(self.model.layers):
            linears = skeleton.logical_linears(index, layer)
            work = LayerWork(
                index=index,
                prefix=skeleton.prefix(index),
                config=skeleton.model.config,
                module=layer,
                linears=linears,
                schemes={n: s for n, s in self.model.schemes.items() if n in linears},
                inputs=inputs,
                base_inputs=None,
                calls={size: handed[index] for size, handed in calls.items()},
            )
            trace = find_groups(work)
            yield from ((work.prefix, g, layer) for g in trace.groups if _holds(work, trace, g))
            inputs = [trace.output]


@torch.no_grad()
def fold(work: LayerWork, group: Group, scales: torch.Tensor) -> None:
    """Divide the output of ``group``'s source by ``scales`` [channels], and let its readers expect that.

    A norm keeps its dtype in the checkpoint: readers get the factor that its rounded weight divides by.
    """
    source = work.module.get_submodule(group.source)
    if isinstance(source, nn.Linear):
        scale_source(source, scales)
    else:
        scales = _divide_norm(source, scales, work.dtypes.get(f"{group.source}.weight", torch.float32))
    for reader in group.readers:
        scale_reader(work.module.get_submodule(reader), scales[group.spread.to(scales.device)])


def _divide_norm(norm: nn.Module, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weight, bias = norm.get_parameter("weight"), norm._parameters.get("bias")
    offset = norm_offset(norm) or 0.0
    factor = weight + offset
    held = (factor / scales - offset).to(dtype).float()
    usable = (factor != 0) & (held + offset != 0)
    taken = torch.where(usable, factor / torch.where(usable, held + offset, 1), 1)
    weight.copy_(torch.where(usable, held, weight))
    if bias is not None:
        bias.div_(taken)
    return taken


def _holds(work: LayerWork, trace: Trace, group: Group) -> bool:
    """Whether scales on ``group`` leave the layer's output alone: tried out, and undone."""
    source = work.module.get_submodule(group.source)
    if not isinstance(source, nn.Linear) and norm_offset(source) is None:
        return False
    modules = [source, *map(work.module.get_submodule, group.readers)]
    before = [(p, p.clone()) for module in modules for p in module.parameters()]
    scales = torch.ones(group.channels, device=work.device)
    scales[::2] = 2.0
    fold(work, group, scales)
    holds = preserved(work, trace)
    for parameter, value in before:
        parameter.copy_(value)
    return holds


def storable(rotation: torch.Tensor) -> torch.Tensor:
    """``rotation`` in values that a dialect which stores it times sqrt(32) gives back unchanged.

    On the CPU, as the dialect computes: a GPU divides by multiplying with the inverse.
    """
    times = ROTATION_SIZE**0.5
    return (rotation * times) / times


def check_memory(skeleton: Skeleton, tokens: int, available_bytes: int | None) -> None:
    """Raise FourfoldError when training on ``tokens`` at a time cannot fit into ``available_bytes``."""
    layer = sum(p.numel() for p in skeleton.layers[0].parameters())
    parameters = sum(p.numel() for p in skeleton.net.parameters())
    vocabulary = int(skeleton.model.config.get("vocab_size") or 0)
    hidden = int(skeleton.model.config.get("hidden_size") or 0)
    needed = 4 * parameters + 24 * layer + tokens * (20 * vocabulary + 4 * hidden * len(skeleton))
    if available_bytes is not None and needed > available_bytes:
        raise FourfoldError(
            f"Training rotations holds the whole model in float32 and {tokens} tokens at a time: about "
            f"{needed / 1e9:.1f} GB, of which {available_bytes / 1e9:.1f} GB are free on {skeleton.device}. "
            "Lower `micro` or --sequence-tokens, take a larger device, or use block-rotation, which needs no "
            "training."
        )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of ``device``; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
