"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the ways configs stretch it.

Channel pairs (i, i + D/2) turn by position * theta^(-2i/D). ``linear`` divides all frequencies by a factor;
``llama3`` (Llama 3.1) divides the low ones, keeps the high ones and blends between; ``yarn`` blends over the
channels and makes the turned heads a little longer. A step's angles are computed from its positions, once for
all layers, so that a context of any length costs no table.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourfold.core.errors import FourfoldError


class Rotary:
    """The angles of positions: float32 speeds [D/2], heads made ``length`` times longer, as ``dtype``."""

    def __init__(self, config: dict[str, Any], head_dim: int, dtype: torch.dtype):
        self.speeds, self.dtype = frequencies(config, head_dim), dtype
        self.length = yarn_length(rope_parameters(config))

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin [T, 1, D] for ``positions`` [T]: computed once a step, used by every layer."""
        angles = torch.outer(positions.float(), self.speeds).unsqueeze(1)
        cos, sin = angles.cos() * self.length, angles.sin() * self.length
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
        yarn_length(rope)
        return SCALINGS[kind](speeds, rope)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
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


def yarn_frequencies(speeds: Tensor, rope: dict[str, Any]) -> Tensor:
    """YaRN (arXiv:2309.00071): channels that turn ``beta_fast`` times in the old context are kept, those
    that turn less than ``beta_slow`` times stretched, and between these a ramp over the channel's number.
    """
    count, theta, old = len(speeds), rope["rope_theta"], rope["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        return count * math.log(old / (turns * 2 * math.pi)) / math.log(theta)

    first, last = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    ramp = (torch.arange(count).float() - first) / (last - first or 0.001)
    stretched = ramp.clamp(0, 1)
    return speeds / rope["factor"] * stretched + speeds * (1 - stretched)


def yarn_length(rope: dict[str, Any]) -> float:
    """By how much YaRN lengthens turned heads, which sharpens attention; 1 for other kinds."""
    if rope["rope_type"] != "yarn":
        return 1.0
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    whole, part = rope.get("mscale"), rope.get("mscale_all_dim")
    growth = 0.1 * math.log(max(1.0, rope["factor"]))
    return (growth * whole + 1) / (growth * part + 1) if whole and part else growth + 1


SCALINGS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "default": lambda speeds, _: speeds,
    "linear": linear_frequencies,
    "llama3": llama3_frequencies,
    "yarn": yarn_frequencies,
}


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (before), in one shape.

    The old context, where it is not said, is the whole one.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if (context := config.get("max_position_embeddings")) is not None:
        rope.setdefault("original_max_position_embeddings", context)
    return rope
