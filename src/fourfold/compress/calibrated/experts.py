"""Experts as separate linear layers, in place of transformers' fused 3-D parameters.

transformers 5 multiplies all experts of a layer as two 3-D tensors. Calibration needs each expert's linear
layers by themselves: to see what reaches them, and to hold them under the names of a checkpoint. What lies
between the linear layers (``_apply_gate``, activation, biases) stays transformers' own.

Routing can be looked at (``count_only``) and laid down (``plan``), which :mod:`routing` uses to show experts
what the calibration set has for them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fourfold.compress.calibrated.linear import CalibratedLinear
from fourfold.compress.experts import FUSED_LEAVES

Routed = Callable[[torch.Tensor, torch.Tensor | None], None]
"""Called with the chosen experts [tokens, k] and the router's logits [tokens, E], if it shows them."""


@dataclass(frozen=True)
class Plan:
    """Which tokens of a batch reach which expert: ``chosen`` [tokens, k] in place of the router's choice, and
    ``extra`` tokens [n] by expert, whose results are thrown away.
    """

    chosen: torch.Tensor
    extra: dict[int, torch.Tensor] = field(default_factory=dict)


class Expert(nn.Module):
    """One expert: ``gate_proj`` and ``up_proj`` [I, H] (or ``up_proj`` alone), ``down_proj`` [H, I]."""

    def __init__(self, hidden: int, width: int, *, gated: bool, bias: bool):
        super().__init__()

        def linear(inputs: int, outputs: int) -> CalibratedLinear:
            return CalibratedLinear(inputs, outputs, bias=bias, device="meta")

        if gated:
            self.gate_proj = linear(hidden, width)
        self.up_proj = linear(hidden, width)
        self.down_proj = linear(width, hidden)

    @property
    def observed(self) -> bool:
        """Whether somebody looks at what reaches this expert."""
        return any(getattr(linear, "observer", None) is not None for linear in self.children())


class SeparateExperts(nn.Module):
    """Takes the place of a fused experts module ``fused``; parameters are on the meta device until filled.

    ``count_only``, when set, is told of the routing, and nothing is computed. With ``only_observed`` nor are
    experts at which nobody looks, for runs whose output nobody takes.
    """

    count_only: Routed | None = None
    plan: Plan | None = None
    only_observed: bool = False

    def __init__(self, fused: nn.Module):
        super().__init__()
        gated, bias = bool(fused.has_gate), bool(fused.has_bias)
        self.count, hidden, width = sizes(fused)
        for index in range(self.count):
            self.add_module(str(index), Expert(hidden, width, gated=gated, bias=bias))
        normed = getattr(fused, "has_post_expert_norm", False)  # older transformers do not have it
        post = getattr(fused, "post_expert_norm", None) if normed else None
        self.post_expert_norm: nn.Module | None = post
        # a tuple hides the module from torch: its parameters are not ours to load
        self._fused: tuple[Any] = (fused,)
        self.gated, self.concatenated = gated, bool(fused.is_concatenated)
        self._logits: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Expert]:
        for index in range(self.count):
            expert = self.get_submodule(str(index))
            assert isinstance(expert, Expert)
            yield expert

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, H], expert numbers [tokens, k], weights [tokens, k] -> [tokens, H]."""
        result = torch.zeros_like(hidden_states)
        if self.count_only is not None:
            logits, self._logits = self._logits, None
            self.count_only(top_k_index, logits)
            return result
        plan = self.plan or Plan(top_k_index)
        flat = plan.chosen.to(top_k_index.device, torch.int64).flatten()
        order, counts = flat.argsort(stable=True), flat.bincount(minlength=self.count).tolist()
        weights = top_k_weights.flatten()
        for index, (expert, chosen) in enumerate(zip(self, order.split(counts), strict=True)):
            token = chosen // top_k_index.shape[1]
            if self.only_observed and not expert.observed:
                continue
            extra = plan.extra.get(index)
            rows = token if extra is None else torch.cat([token, extra.to(token)])
            if len(rows):
                out = self._run(expert, hidden_states[rows])[: len(token)] * weights[chosen, None]
                result.index_add_(0, token, out.to(result.dtype))
        return result

    def watch(self, router: nn.Module) -> None:
        """Keep what ``router`` gives, which runs before the experts, while they only count."""
        router.register_forward_hook(self._keep_logits)

    def _keep_logits(self, _module: nn.Module, _args: object, output: Any) -> None:
        if self.count_only is None:
            return
        outputs = output if isinstance(output, tuple) else (output,)
        found = next((o for o in outputs if _is_logits(o, self.count)), None)
        self._logits = None if found is None else found.detach().reshape(-1, self.count)

    def _run(self, expert: Expert, x: torch.Tensor) -> torch.Tensor:
        out = expert.down_proj(self._between(expert, x))
        return out if self.post_expert_norm is None else self.post_expert_norm(out)

    def _between(self, expert: Expert, x: torch.Tensor) -> torch.Tensor:
        (fused,) = self._fused
        up = expert.up_proj(x)
        if not self.gated:
            return fused.act_fn(up)
        gate = expert.gate_proj(x)
        both = torch.cat([gate, up], -1) if self.concatenated else torch.stack([gate, up], -1).flatten(-2)
        return fused._apply_gate(both)


def _is_logits(output: Any, experts: int) -> bool:
    is_float = isinstance(output, torch.Tensor) and output.is_floating_point()
    return is_float and output.shape[-1] == experts


def sizes(fused: nn.Module) -> tuple[int, int, int]:
    """Number of experts, hidden size and inner size of transformers' fused experts."""
    down = fused.down_proj
    assert isinstance(down, torch.Tensor)
    count, first, second = down.shape
    return (count, second, first) if fused.is_transposed else (count, first, second)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is one of transformers' fused experts."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "_apply_gate") and isinstance(down, torch.Tensor) and down.ndim == 3


def separate_experts(parent: nn.Module) -> None:
    """Replace every fused experts module below ``parent``."""
    for name, child in list(parent.named_children()):
        if not is_fused(child):
            separate_experts(child)
            continue
        experts = SeparateExperts(child)
        setattr(parent, name, experts)
        if (router := find_router(parent, experts)) is not None:
            experts.watch(router)


def find_router(parent: nn.Module, experts: SeparateExperts) -> nn.Module | None:
    """The module beside ``experts`` that has a weight [E, H]."""
    hidden = next(iter(experts)).up_proj.in_features
    for child in parent.children():
        if child is not experts and any(p.shape == (experts.count, hidden) for p in child.parameters()):
            return child
    return None


def parameters_apart(net: nn.Module) -> set[str]:
    """Names of all that ``net`` loads from a checkpoint, as they are once its experts are separate."""
    names = set(net.state_dict())
    for prefix, module in net.named_modules():
        if not is_fused(module):
            continue
        for leaf, projections in FUSED_LEAVES.items():
            for name, kind in ((f"{prefix}.{leaf}", "weight"), (f"{prefix}.{leaf}_bias", "bias")):
                if name in names:
                    names.remove(name)
                    names |= {
                        f"{prefix}.{e}.{p}.{kind}" for e in range(sizes(module)[0]) for p in projections
                    }
    return names
