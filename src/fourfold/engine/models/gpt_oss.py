"""gpt-oss: experts with biases and a clamped gate, attention sinks, windows in every second layer.

As released, its experts are fused and in MXFP4, and stay so in memory; copies in bfloat16 hold them
transposed. Gate and up are interleaved in both.
"""

from dataclasses import replace
from typing import Any

from fourfold.engine.decoder import Biases, Decoder, SelfAttention, slides
from fourfold.engine.experts import Experts
from fourfold.engine.layers import Gating
from fourfold.engine.shape import ExpertShape
from fourfold.engine.weights import Weights

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(Decoder):
    """``model_type: gpt_oss``."""

    defaults = {
        "head_dim": 64,
        "sliding_window": 128,
        "attention_bias": True,
        "rope_theta": 150000.0,
        "rope_scaling": YARN,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }

    @classmethod
    def window(cls, config: dict[str, Any], layer: int) -> int | None:
        """``sliding_window`` as ``layer_types`` says, or else in every second layer from the first."""
        return config["sliding_window"] if slides(config, layer, layer % 2 == 0) else None

    @classmethod
    def biases(cls, config: dict[str, Any]) -> Biases:
        """Of attention, as the config says."""
        bias = bool(config["attention_bias"])
        return Biases(bias, bias)

    @classmethod
    def gating(cls, config: dict[str, Any]) -> Gating:
        """Clamped; ``hidden_act`` says silu, and means nothing."""
        return Gating("clamped-swish", float(config["swiglu_alpha"]), float(config["swiglu_limit"]))

    @classmethod
    def experts(cls, config: dict[str, Any], layer: int) -> Experts:
        """In every layer."""
        return Experts(
            ExpertShape.of(config, "intermediate_size"),
            cls.gating(config),
            bias=True,
            router="mlp.router",
            interleaved=True,
            transposed=True,
        )

    def build_attention(self, weights: Weights, prefix: str, index: int) -> SelfAttention:
        """With the ``sinks`` of the heads."""
        attention = super().build_attention(weights, prefix, index)
        sinks = weights.values(prefix + "sinks", (self.shape.heads,))
        attention.scoring = replace(attention.scoring, sinks=sinks)
        return attention


MODEL = GptOss
