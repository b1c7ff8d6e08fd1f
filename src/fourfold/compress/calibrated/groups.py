"""Which linear layers share an input, and which operation before them can take a scale at no run-time cost.

If channel j of an operation's output is divided by s_j and column j of every weight that reads it is
multiplied by s_j, the layer computes what it did. Three operations can take the division: a norm (its
weight), ``v_proj`` before ``o_proj`` (attention mixes tokens, never channels; grouped heads repeat a
channel), and ``up_proj`` before ``down_proj`` where the layer multiplies it with an activated gate and does
nothing else to it.

Norms and their readers are found by running the layer and comparing tensors, not by name, so that routers,
shared experts and linear attention are seen in any architecture. The two pairs are found by name; that the
multiplication of the second is plain is tried out, since gpt-oss adds one and clamps. A reader that is no
module with a weight stays unseen here: :mod:`fourfold.compress.calibrated.folding` compares outputs after.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fourfold.compress.calibrated.experts import Expert, SeparateExperts
from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.calibrated.work import LayerWork

PROBES = (1.0, 1000.0)  # the second to meet clamps
VALUE_AND_OUTPUT = (("v_proj", "o_proj"), ("v_proj", "out_proj"))


@dataclass(frozen=True, eq=False)
class Group:
    """``source`` and ``readers`` are module names inside the layer; ``spread`` int64 [in] says which channel
    of the source each input of a reader comes from.
    """

    source: str
    readers: tuple[str, ...]
    spread: torch.Tensor

    @property
    def channels(self) -> int:
        """How many scales the source takes."""
        return int(self.spread.max()) + 1


@dataclass(frozen=True, eq=False)
class Trace:
    """One run of the layer: its input and output, and what passed through its modules."""

    hidden: torch.Tensor
    output: torch.Tensor
    groups: list[Group]


@torch.no_grad()
def exact_forward(work: LayerWork, hidden: torch.Tensor) -> torch.Tensor:
    """The layer's output [B, T, H], computed in float32 whatever the device."""
    call = work.calls[len(hidden)]
    with torch.autocast(work.device.type, enabled=False):
        out = work.module(hidden.to(work.device, torch.float32), *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


def find_groups(work: LayerWork) -> Trace:
    """Every group of ``work`` of which the recipe rounds at least one reader."""
    hidden = min(work.inputs, key=len)
    modules = dict(work.module.named_modules())
    # what experts hand on among themselves would be kept for nothing: they read as one
    inside = {id(linear) for m in modules.values() if isinstance(m, Expert) for linear in m.children()}
    normed, readers = {}, {}
    hooks = [m.register_forward_hook(_keep(normed, n)) for n, m in modules.items() if _is_norm(m)]
    hooks += [
        m.register_forward_pre_hook(_keep(readers, n))
        for n, m in modules.items()
        if _reads(m) and id(m) not in inside
    ]
    try:
        output = exact_forward(work, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    found = [group for name, out in normed.items() if (group := _behind(work.module, name, out, readers))]
    found += _attention_groups(work.module) + _product_groups(work.module)
    rounded = {id(work.linears[name]) for name in work.schemes}
    return Trace(
        hidden,
        output,
        [g for g in found if any(id(work.module.get_submodule(r)) in rounded for r in g.readers)],
    )


def _keep(into: dict[str, torch.Tensor], name: str) -> Any:
    """A hook that keeps a module's output, or before it runs its input."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        value = output if output is not None else next(iter(args), None)
        if isinstance(value, torch.Tensor):
            into[name] = value

    return hook


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not list(module.children())


def _reads(module: nn.Module) -> bool:
    if isinstance(module, SeparateExperts):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not list(module.children())


def _behind(layer: nn.Module, norm: str, out: torch.Tensor, readers: dict[str, torch.Tensor]) -> Group | None:
    """The group of ``norm``, whose output was ``out``; None when no reader's input was that."""
    names: list[str] = []
    width = 0
    for name, seen in readers.items():
        if seen.numel() != out.numel() or not torch.equal(seen.reshape(-1), out.reshape(-1)):
            continue
        width = seen.shape[-1]
        names += _linears_of(layer, name)
    size = layer.get_submodule(norm).get_parameter("weight").numel()
    if not names or width % size:
        return None
    return Group(norm, tuple(names), torch.arange(size).repeat(width // size))


def _linears_of(layer: nn.Module, name: str) -> list[str]:
    """A reader itself, or of experts the linear layers that read what the experts are given."""
    experts = layer.get_submodule(name)
    if not isinstance(experts, SeparateExperts):
        return [name]
    leaves = ("gate_proj", "up_proj") if experts.gated else ("up_proj",)
    return [f"{name}.{index}.{leaf}" for index in range(len(experts)) for leaf in leaves]


def _attention_groups(layer: nn.Module) -> list[Group]:
    found = []
    for parent, module in layer.named_modules():
        for value_name, output_name in VALUE_AND_OUTPUT:
            value, output = getattr(module, value_name, None), getattr(module, output_name, None)
            if isinstance(value, CalibratedLinear) and isinstance(output, CalibratedLinear):
                spread = _spread_of_heads(module, value.out_features, output.in_features)
                if spread is not None:
                    found.append(Group(f"{parent}.{value_name}", (f"{parent}.{output_name}",), spread))
    return found


def _spread_of_heads(attention: nn.Module, values: int, outputs: int) -> torch.Tensor | None:
    """Query head h reads key-value head h // (query heads a key-value head), as transformers repeats them."""
    size = getattr(attention, "head_dim", None) or values
    if outputs % values or values % size:
        return None
    heads = torch.arange(values).view(-1, 1, size)
    return heads.expand(-1, outputs // values, -1).reshape(-1)


def _product_groups(layer: nn.Module) -> list[Group]:
    found = []
    for parent, module in layer.named_modules():
        if isinstance(module, SeparateExperts):
            first = next(iter(module))
            assert isinstance(first, Expert)
            if module.gated and _passes_scale(
                first, lambda x, m=module, e=first: e.down_proj(m._between(e, x))
            ):
                found += [_product_group(f"{parent}.{index}", expert) for index, expert in enumerate(module)]
        elif not isinstance(module, Expert) and _is_product(module) and _passes_scale(module, module):
            found.append(_product_group(parent, module))
    return found


def _product_group(parent: str, module: nn.Module) -> Group:
    width = module.get_submodule("down_proj").get_parameter("weight").shape[1]
    return Group(f"{parent}.up_proj", (f"{parent}.down_proj",), torch.arange(width))


def _is_product(module: nn.Module) -> bool:
    up, down = getattr(module, "up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(up, CalibratedLinear) and isinstance(down, CalibratedLinear)):
        return False
    return up.out_features == down.in_features


@torch.no_grad()
def _passes_scale(module: nn.Module, run: Any) -> bool:
    """Whether a scale on ``up_proj``'s outputs reaches ``down_proj``'s inputs as it is."""
    up, down = module.get_submodule("up_proj"), module.get_submodule("down_proj")
    assert isinstance(up, CalibratedLinear) and isinstance(down, CalibratedLinear)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, up.in_features, generator=generator).to(up.weight)
    # powers of two, so that multiplying and dividing leaves the weights as they were
    scale = 2.0 ** torch.randint(-2, 3, (up.out_features,), generator=generator).to(up.weight)
    before = [run(x * size) for size in PROBES]
    scale_source(up, scale)
    scale_reader(down, scale)
    after = [run(x * size) for size in PROBES]
    scale_source(up, 1 / scale)
    scale_reader(down, 1 / scale)
    return all(
        torch.allclose(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))
        for a, b in zip(after, before, strict=True)
    )


def scale_source(linear: nn.Linear, scale: torch.Tensor) -> None:
    """Divide the outputs of ``linear`` by ``scale`` [out]."""
    linear.weight.div_(scale[:, None])
    if linear.bias is not None:
        linear.bias.div_(scale)


def scale_reader(reader: nn.Module, scale: torch.Tensor) -> None:
    """Make ``reader`` expect inputs that are divided by ``scale`` [in]."""
    reader.get_parameter("weight").mul_(scale)
