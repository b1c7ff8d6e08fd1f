"""Experts as separate linear layers, in place of transformers' fused 3-D parameters.

transformers 5 multiplies all experts of a layer as two 3-D tensors. Calibration needs each expert's linear
layers by themselves: to see what reaches them, and to hold them under the names of a checkpoint. What lies
between the linear layers (``_apply_gate``, activation, biases) stays transformers' own.
"""

import torch
from torch import nn

from fourfold.compress.calibrated.linear import CalibratedLinear


class Expert(nn.Module):
    """One expert: ``gate_proj`` and ``up_proj`` [I, H] (or ``up_proj`` alone), ``down_proj`` [H, I]."""

    def __init__(self, hidden: int, width: int, *, gated: bool, bias: bool):
        super().__init__()
        if gated:
            self.gate_proj = CalibratedLinear(hidden, width, bias=bias)
        self.up_proj = CalibratedLinear(hidden, width, bias=bias)
        self.down_proj = CalibratedLinear(width, hidden, bias=bias)


class SeparateExperts(nn.ModuleList):
    """Takes the place of a fused experts module ``fused``, whose parameters may be on the meta device."""

    def __init__(self, fused: nn.Module):
        gated, bias = bool(fused.has_gate), bool(fused.has_bias)
        down = fused.down_proj
        assert isinstance(down, torch.Tensor)
        count, *sizes = down.shape
        width, hidden = sizes if fused.is_transposed else reversed(sizes)
        super().__init__(Expert(hidden, width, gated=gated, bias=bias) for _ in range(count))
        # a tuple hides the module from torch: its parameters are not ours to load
        self._fused = (fused,)
        self.gated, self.concatenated = gated, bool(fused.is_concatenated)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, H], expert numbers [tokens, k], weights [tokens, k] -> [tokens, H]."""
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            assert isinstance(expert, Expert)
            token, choice = torch.where(top_k_index == index)
            if not len(token):
                continue
            out = expert.down_proj(self._between(expert, hidden_states[token]))
            result.index_add_(0, token, (out * top_k_weights[token, choice, None]).to(result.dtype))
        return result

    def _between(self, expert: Expert, x: torch.Tensor) -> torch.Tensor:
        (fused,) = self._fused
        up = expert.up_proj(x)
        if not self.gated:
            return fused.act_fn(up)
        gate = expert.gate_proj(x)
        both = torch.cat([gate, up], -1) if self.concatenated else torch.stack([gate, up], -1).flatten(-2)
        return fused._apply_gate(both)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is one of transformers' fused experts."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "_apply_gate") and isinstance(down, torch.Tensor) and down.ndim == 3


def separate_experts(parent: nn.Module) -> None:
    """Replace every fused experts module below ``parent``."""
    for name, child in list(parent.named_children()):
        if is_fused(child):
            setattr(parent, name, SeparateExperts(child))
        else:
            separate_experts(child)
