"""The decoder of Llama and its nearest kin in torch alone, for passes that see one layer after the other.

Modules are named as in transformers and compute bit for bit what its modules compute, since they do the same
operations in the same order (transformers 5.23, models/llama, mistral, qwen2, qwen3; tests compare). So no
pass sees a difference, and a run saves what it costs to import transformers' models: three seconds of
processor time and some 200 MB. The price is a second spelling of these layers. A configuration that asks for
anything else (another activation, a sliding window, another rotary embedding) is transformers' to build.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fourfold.compress.calibrated.linear import CalibratedLinear

KINDS = ("llama", "mistral", "qwen2", "qwen3")
STRETCHES = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPES = {"default": ("rope_theta",), "llama3": ("rope_theta", *STRETCHES)}


@dataclass(frozen=True)
class Shape:
    """Sizes, biases (of q, k and v; of o; of the MLP), and whether heads of q and k are normed."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    biases: tuple[bool, bool, bool]
    head_norms: bool
    rope: dict[str, Any]


def plain_model(config: dict[str, Any]) -> "PlainModel | None":
    """The model of ``config`` on the meta device; None when it takes transformers to build it."""
    shape = shape_of(config)
    if shape is None:
        return None
    with torch.device("meta"):
        return PlainModel(shape)


def shape_of(config: dict[str, Any]) -> Shape | None:
    """What ``config`` says, None where it is not plain or does not say it all."""
    kind = config.get("model_type")
    rope = rope_of(config)
    if kind not in KINDS or rope is None or config.get("hidden_act") != "silu" or _slides(config):
        return None
    biased = bool(config.get("attention_bias")) and kind in ("llama", "qwen3")
    try:
        heads, head_dim = config["num_attention_heads"], config.get("head_dim")
        if head_dim is None and kind != "qwen3":
            head_dim = config["hidden_size"] // heads
        if head_dim is None:
            return None
        return Shape(
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            eps=config["rms_norm_eps"],
            biases=(biased or kind == "qwen2", biased, bool(config.get("mlp_bias")) and kind == "llama"),
            head_norms=kind == "qwen3",
            rope=rope,
        )
    except KeyError:
        return None


def rope_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The parameters of the rotary embedding, when it is Llama's own or that of Llama 3.1."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    rope = {"rope_theta": config.get("rope_theta")} | given | {"rope_type": kind}
    partial = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1
    whole = partial == 1 and all(isinstance(rope.get(key), (int, float)) for key in ROPES.get(kind, ()))
    return rope if kind in ROPES and whole else None


def _slides(config: dict[str, Any]) -> bool:
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        return True
    if config["model_type"] == "mistral":
        return config.get("sliding_window", True) is not None
    return bool(config.get("use_sliding_window"))


class PlainModel(nn.Module):
    """The decoder and its head, of which only the decoder runs."""

    base_model_prefix = "model"

    def __init__(self, shape: Shape):
        super().__init__()
        self.model = Decoder(shape)
        self.lm_head = CalibratedLinear(shape.hidden, shape.vocabulary, bias=False)


class Decoder(nn.Module):
    """Token ids [B, T] -> hidden states [B, T, H]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """See the class."""
        hidden = self.embed_tokens(input_ids)
        angles = self._angles(input_ids.shape[1], hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=angles)
        return self.norm(hidden)

    def _angles(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [1, T, D] of every position."""
        positions = torch.arange(length, device=device)[None, :, None].float()
        angles = positions * speeds(self.shape).to(device)
        both = torch.cat((angles, angles), -1)
        return both.cos(), both.sin()


def speeds(shape: Shape) -> torch.Tensor:
    """Radians a position for each pair of channels [D / 2]; Llama 3.1 stretches the long waves."""
    rope = shape.rope
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float) / shape.head_dim
    plain = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "default":
        return plain
    factor, low, high, old = (rope[key] for key in STRETCHES)
    waves = 2 * math.pi / plain
    slow = torch.where(waves > old / low, plain / factor, plain)
    smooth = (old / waves - low) / (high - low)
    between = ~(waves < old / high) * ~(waves > old / low)
    return torch.where(between, (1 - smooth) * slow / factor + smooth * slow, slow)


class Embedding(nn.Embedding):
    """Rows that come from a checkpoint: on the meta device, torch would import its compiler to draw them."""

    def reset_parameters(self) -> None:
        """Nothing."""


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape, index: int):
        super().__init__()
        self.self_attn = Attention(shape, index)
        self.mlp = MLP(shape)
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)

    def forward(self, hidden: torch.Tensor, **handed: Any) -> torch.Tensor:
        """Hidden states [B, T, H] -> the same after the layer."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **handed)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Causal attention of grouped heads over whole sequences."""

    def __init__(self, shape: Shape, index: int):
        super().__init__()
        self.layer_idx, self.head_dim = index, shape.head_dim
        self.grouped, self.scaling = shape.heads != shape.kv_heads, shape.head_dim**-0.5
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        into, out, _ = shape.biases
        self.q_proj = CalibratedLinear(shape.hidden, queries, bias=into)
        self.k_proj = CalibratedLinear(shape.hidden, keys, bias=into)
        self.v_proj = CalibratedLinear(shape.hidden, keys, bias=into)
        self.o_proj = CalibratedLinear(queries, shape.hidden, bias=out)
        if shape.head_norms:
            self.q_norm, self.k_norm = (Norm(shape.head_dim, shape.eps) for _ in range(2))

    def forward(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Any = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] -> what attention adds. ``past_key_values`` sees keys and values."""
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        queries, keys = self.q_proj(hidden).view(heads), self.k_proj(hidden).view(heads)
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        cos, sin = (angle[:, None] for angle in position_embeddings)
        queries, keys = (turned(x.transpose(1, 2), cos, sin) for x in (queries, keys))
        values = self.v_proj(hidden).view(heads).transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        several = hidden.shape[1] > 1
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=several, scale=self.scaling, enable_gqa=self.grouped
        )
        return self.o_proj(out.transpose(1, 2).reshape(*hidden.shape[:-1], -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape):
        super().__init__()
        *_, bias = shape.biases
        self.gate_proj = CalibratedLinear(shape.hidden, shape.intermediate, bias=bias)
        self.up_proj = CalibratedLinear(shape.hidden, shape.intermediate, bias=bias)
        self.down_proj = CalibratedLinear(shape.intermediate, shape.hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width], computed in float32."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads [B, heads, T, D] after the rotary embedding."""
    half = x.shape[-1] // 2
    return (x * cos) + (torch.cat((-x[..., half:], x[..., :half]), -1) * sin)
