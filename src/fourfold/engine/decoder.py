"""What decoder architectures have in common: embed, a stack of layers, a last norm, a head.

    x = embed(tokens);  for each layer: x += attention(norm(x)); x += mlp(norm(x));  logits = head(norm(x))

The sum x is float32 whatever the dtype of the weights. It is next to free; rounding x to bfloat16 at every
layer moved a 135M Llama's logits 0.147 from float32's on average, instead of 0.102.

An architecture's file says only in what it differs: which layers have biases or experts, how far attention
sees, whether its heads are normed. The names are those that all of these share in Hugging Face checkpoints.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.core.errors import FourfoldError
from fourfold.engine.attention import Attention, Scoring
from fourfold.engine.experts import Experts, MixtureOfExperts, build_experts
from fourfold.engine.layers import FusedLinear, GatedMLP, Gating, Linear, RMSNorm
from fourfold.engine.rotary import Rotary, frequencies, rotate_
from fourfold.engine.shape import Shape, reading
from fourfold.engine.weights import Weights

GATINGS = {"silu": Gating("silu"), "gelu_pytorch_tanh": Gating("gelu-tanh")}


class Biases(NamedTuple):
    """Which linear layers add a bias."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


class SelfAttention:
    """Rotary attention with grouped key heads. ``qk_norm`` float32 [q_heads + kv_heads, D] where heads are
    normed; ``rotary`` is the number of the model's Rotary that turns them.
    """

    __slots__ = ("eps", "head_dim", "output", "qk_norm", "qkv", "rotary", "rotated", "scoring")

    def __init__(
        self,
        shape: Shape,
        qkv: Linear | FusedLinear,
        output: Linear,
        scoring: Scoring,
        rotary: int = 0,
        qk_norm: Tensor | None = None,
    ):
        self.qkv, self.output, self.qk_norm, self.eps = qkv, output, qk_norm, shape.eps
        self.head_dim, self.rotated = shape.head_dim, shape.heads + shape.kv_heads
        self.scoring, self.rotary = scoring, rotary

    def __call__(self, x: Tensor, layer: int, angles: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """Attention output [T, hidden] for normed states x [T, hidden]."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        turning = qkv[:, : self.rotated]
        if self.qk_norm is not None:
            normed = F.rms_norm(turning.float(), (self.head_dim,), None, self.eps)
            turning.copy_(normed.mul_(self.qk_norm))
        rotate_(turning, angles)
        return self.output(attention(layer, qkv, self.scoring))


@dataclass(slots=True)
class Layer:
    """One transformer block, norms first, and where there are some, norms of what is added."""

    attention_norm: RMSNorm
    attention: SelfAttention
    mlp_norm: RMSNorm
    mlp: GatedMLP | MixtureOfExperts
    attention_post_norm: RMSNorm | None = None
    mlp_post_norm: RMSNorm | None = None


class Decoder:
    """A decoder in memory; calls are stateless, the attention object carries what differs by step.

    Architectures override the class variables and the methods up to ``softcap_of_logits``.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    """What transformers takes where the config does not speak of a key."""
    norm_offset: ClassVar[float] = 0.0
    """By how much the weights of norms are more than what is stored."""
    norms_heads: ClassVar[bool] = False
    """Whether query and key heads are normed before they turn."""

    def __init__(self, config: dict[str, Any], weights: Weights):
        self.config = config = self.settings(config)
        self.shape = shape = Shape.of(config)
        self.dtype, self.prefix = weights.dtype, self.prefix_in(weights)
        embedding = (shape.vocabulary, shape.hidden)
        self.embedding_scale = self.scale_of_embedding()
        self.rotaries = [Rotary(rope, shape.head_dim, weights.dtype) for rope in self.ropes(config)]
        self.layers = [self.build_layer(weights, f"{self.prefix}layers.{i}.", i) for i in range(shape.layers)]
        self.norm = self.build_norm(weights, self.prefix + "norm")
        tokens = self.prefix + "embed_tokens"
        self.tied = shape.tied and not weights.is_packed("lm_head.weight")
        self.head = weights.linear(tokens if self.tied else "lm_head", *embedding)
        self._embedding = None if self.tied else weights.tensor(tokens + ".weight", embedding)
        self.logit_softcap = self.softcap_of_logits(config)

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """Raises FourfoldError for a config that this class cannot follow, before any weight is read."""
        config = cls.settings(config)
        shape = Shape.of(config)
        for rope in cls.ropes(config):
            frequencies(rope, shape.head_dim)
        cls.gating(config)
        with reading():
            for layer in range(shape.layers):
                cls.scoring(config, layer)
                cls.experts(config, layer)

    @classmethod
    def settings(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The part of a checkpoint's config that describes the decoder, with what it leaves unsaid."""
        return cls.defaults | config

    def prefix_in(self, weights: Weights) -> str:
        """What the names of the decoder's parameters begin with."""
        return "model."

    @classmethod
    def ropes(cls, config: dict[str, Any]) -> list[dict[str, Any]]:
        """Configs of the rotary embeddings that there are, as ``rotary.frequencies`` reads them."""
        return [config]

    @classmethod
    def rotary_of(cls, config: dict[str, Any], layer: int) -> int:
        """Which of ``ropes`` turns the heads of ``layer``."""
        return 0

    @classmethod
    def window(cls, config: dict[str, Any], layer: int) -> int | None:
        """How many tokens, itself included, a token of ``layer`` sees; None: all."""
        return None

    @classmethod
    def scoring(cls, config: dict[str, Any], layer: int) -> Scoring:
        """How ``layer`` weighs what it sees. Raises FourfoldError for a window that is none."""
        return Scoring(Shape.of(config).head_dim ** -0.5, checked_window(cls.window(config, layer)))

    @classmethod
    def biases(cls, config: dict[str, Any]) -> Biases:
        """Which layers have biases."""
        return Biases()

    @classmethod
    def gating(cls, config: dict[str, Any]) -> Gating:
        """The MLP's gate, by ``hidden_act``. Raises FourfoldError for one that the engine does not have."""
        return gating_called(config.get("hidden_act", "silu"))

    @classmethod
    def experts(cls, config: dict[str, Any], layer: int) -> Experts | None:
        """The experts of ``layer``; None: it has one MLP."""
        return None

    def scale_of_embedding(self) -> float:
        """What embedded tokens are multiplied by."""
        return 1.0

    @classmethod
    def softcap_of_logits(cls, config: dict[str, Any]) -> float | None:
        """c where logits become c tanh(logits / c)."""
        return None

    def head_norms(self, weights: Weights, prefix: str) -> Tensor | None:
        """Float32 q_norm for every query head, then k_norm for every key head [heads + kv_heads, D]."""
        if not self.norms_heads:
            return None
        s = self.shape
        q, k = (weights.values(f"{prefix}{name}.weight", (s.head_dim,)) for name in ("q_norm", "k_norm"))
        return torch.cat([q.expand(s.heads, -1), k.expand(s.kv_heads, -1)]) + self.norm_offset

    def build_norm(self, weights: Weights, module: str) -> RMSNorm:
        """A norm over the hidden features."""
        return weights.norm(module, self.shape.hidden, self.shape.eps, self.norm_offset)

    def build_layer(self, weights: Weights, prefix: str, index: int) -> Layer:
        """One block: input_layernorm, self_attn, post_attention_layernorm, mlp."""
        return Layer(
            self.build_norm(weights, prefix + "input_layernorm"),
            self.build_attention(weights, prefix + "self_attn.", index),
            self.build_norm(weights, prefix + "post_attention_layernorm"),
            self.build_mlp(weights, prefix, index),
        )

    def build_attention(self, weights: Weights, prefix: str, index: int) -> SelfAttention:
        """Attention from {q,k,v,o}_proj."""
        s, biases = self.shape, self.biases(self.config)
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        return SelfAttention(
            s,
            weights.fused(prefix, {"q_proj": q, "k_proj": kv, "v_proj": kv}, s.hidden, biases.qkv),
            weights.linear(prefix + "o_proj", s.hidden, q, biases.output),
            self.scoring(self.config, index),
            self.rotary_of(self.config, index),
            self.head_norms(weights, prefix),
        )

    def build_mlp(self, weights: Weights, prefix: str, index: int) -> GatedMLP | MixtureOfExperts:
        """Experts where the layer has them, or else mlp.{gate,up,down}_proj."""
        experts = self.experts(self.config, index)
        if experts is not None:
            return build_experts(weights, prefix, self.shape.hidden, experts)
        s, bias, prefix = self.shape, self.biases(self.config).mlp, prefix + "mlp."
        gate_up = {"gate_proj": s.intermediate, "up_proj": s.intermediate}
        return GatedMLP(
            weights.fused(prefix, gate_up, s.hidden, bias),
            weights.linear(prefix + "down_proj", s.hidden, s.intermediate, bias),
            self.gating(self.config),
        )

    def hidden(self, token_ids: Tensor, attention: Attention) -> Tensor:
        """Float32 states [T, hidden] before the last norm, for ids [T] standing at attention.positions."""
        return self.through(self.embed(token_ids), attention, 0, len(self.layers))

    @property
    def embedding(self) -> Tensor:
        """What tokens are looked up in, [V, hidden]."""
        if self._embedding is None:
            table = self.head.weight
            self._embedding = table if isinstance(table, Tensor) else table.dequantize(self.dtype)
        return self._embedding

    def embed(self, token_ids: Tensor) -> Tensor:
        """Float32 states [T, hidden] before the first layer."""
        x = F.embedding(token_ids, self.embedding).float()
        return x if self.embedding_scale == 1 else x.mul_(self.embedding_scale)

    def through(self, x: Tensor, attention: Attention, first: int, end: int) -> Tensor:
        """States x [T, hidden] after layers ``first`` to ``end - 1``, changed in place."""
        angles = [rotary.at(attention.positions) for rotary in self.rotaries]
        for index in range(first, end):
            layer = self.layers[index]
            y = layer.attention(layer.attention_norm(x), index, angles[layer.attention.rotary], attention)
            x.add_(y if layer.attention_post_norm is None else layer.attention_post_norm(y))
            y = layer.mlp(layer.mlp_norm(x))
            x.add_(y if layer.mlp_post_norm is None else layer.mlp_post_norm(y))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] in the model's dtype for hidden states [T, hidden]."""
        logits = self.head(self.norm(hidden))
        cap = self.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def gating_called(name: Any) -> Gating:
    """The gate of the activation ``name`` as configs call it."""
    if name not in GATINGS:
        raise FourfoldError(
            f"config.json asks for the activation '{name}'; the engine computes {' and '.join(GATINGS)} "
            "only. Quantizing and converting work without the engine."
        )
    return GATINGS[name]


def slides(config: dict[str, Any], layer: int, otherwise: bool) -> bool:
    """Whether ``layer`` has the window, as ``layer_types`` says; ``otherwise`` where the config has none.

    Raises FourfoldError for a list too short, or a layer that is of another kind altogether.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return otherwise
    kind = kinds[layer] if layer < len(kinds) else None
    if kind not in ("sliding_attention", "full_attention"):
        raise FourfoldError(
            f"config.json says of layer {layer} that it is '{kind}'; the engine computes "
            "sliding_attention and full_attention only. Quantizing and converting work without the engine."
        )
    return kind == "sliding_attention"


def checked_window(window: Any) -> int | None:
    """``window``. Raises FourfoldError unless it is None or a positive number."""
    if window is not None and (type(window) is not int or window < 1):
        raise FourfoldError(
            f"config.json asks for a sliding window of {window!r} tokens, which is none. Restore the "
            "original."
        )
    return window
