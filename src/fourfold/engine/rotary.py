"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the ways configs stretch it.

Channel pairs (i, i + D/2) turn by position * theta^(-2i/D). ``linear`` divides all frequencies by a factor;
``llama3`` (Llama 3.1) divides the low ones, keeps the high ones and blends between. A step's angles are
computed from its positions, once for all layers, so that a context of any length costs no table.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourfold.core.errors import FourfoldError


class Rotary:
    """The angles of positions: float32 speeds [D/2], answers in ``dtype``."""

    def __init__(self, config: dict[str, Any], head_dim: int, dtype: torch.dtype):
        self.speeds, self.dtype = frequencies(config, head_dim), dtype

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin [T, 1, D] for ``positions`` [T]: computed once a step, used by every layer."""
        angles = torch.outer(positions.float(), self.speeds).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).to(self.dtype), torch.cat([-sin, sin], -1).to(self.dtype)


def rotate_(heads: Tensor, angles: tuple[Tensor, Tensor]) -> None:
    """Turn ``heads`` [T, H, D] in place by ``Rotary.at``'s angles."""
    cos, sin = angles
    turned = heads.roll(heads.shape[-1] // 2, -1).mul_(sin)
    torch.addcmul(turned, heads, cos, out=heads)


def frequencies(config: dict[str, Any], head_dim: int) -> Tensor:
    """Turning speeds [D/2], radians per position. Raises FourfoldError for a kind of scaling not known."""
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    if kind not in SCALINGS:
        raise FourfoldError(
            f"The config's rope type '{kind}' is not known to the engine, which has: {', '.join(SCALINGS)}. "
            "Use a model with one of these."
        )
    try:
        theta = float(rope["rope_theta"])
        speeds = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        return SCALINGS[kind](speeds, rope)
    except (KeyError, TypeError, ValueError) as error:
        raise FourfoldError(
            f"The config's rotary embedding of type '{kind}' lacks or spoils a value ({error}). Restore the "
            "model's original config.json."
        ) from error


def linear_frequencies(speeds: Tensor, rope: dict[str, Any]) -> Tensor:
    """Position interpolation (arXiv:2306.15595): all waves stretched alike."""
    return speeds / rope["factor"]


def llama3_frequencies(speeds: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling: waves longer than the old context are stretched, short ones kept."""
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = old * speeds / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * speeds / factor + kept * speeds


SCALINGS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "default": lambda speeds, _: speeds,
    "linear": linear_frequencies,
    "llama3": llama3_frequencies,
}


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (before), in one shape."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope
