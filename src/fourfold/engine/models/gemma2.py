"""Gemma 2: norms before and after attention and MLP, GELU, scaled embeddings, capped scores and logits."""

from typing import Any

import torch

from fourfold.engine.attention import Scoring
from fourfold.engine.decoder import Biases, Decoder, Layer, checked_window, gating_called, slides
from fourfold.engine.layers import Gating
from fourfold.engine.weights import Weights


class Gemma2(Decoder):
    """``model_type: gemma2``. The weights of norms are stored less 1; windows in every second layer."""

    defaults = {
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    norm_offset = 1.0

    @classmethod
    def slides(cls, config: dict[str, Any], layer: int) -> bool:
        """Whether ``layer`` has a window: as ``layer_types`` says, or else every second from the first."""
        return slides(config, layer, layer % 2 == 0)

    @classmethod
    def window(cls, config: dict[str, Any], layer: int) -> int | None:
        """``sliding_window`` in the layers that have one."""
        return config["sliding_window"] if cls.slides(config, layer) else None

    @classmethod
    def scoring(cls, config: dict[str, Any], layer: int) -> Scoring:
        """Scaled by ``query_pre_attn_scalar`` in place of the heads' size, and capped."""
        scale = float(config["query_pre_attn_scalar"]) ** -0.5
        return Scoring(scale, checked_window(cls.window(config, layer)), config["attn_logit_softcapping"])

    @classmethod
    def biases(cls, config: dict[str, Any]) -> Biases:
        """Of attention, where the config says so."""
        bias = bool(config.get("attention_bias"))
        return Biases(bias, bias)

    @classmethod
    def gating(cls, config: dict[str, Any]) -> Gating:
        """By ``hidden_activation``; ``hidden_act`` means nothing here."""
        return gating_called(config["hidden_activation"])

    @classmethod
    def softcap_of_logits(cls, config: dict[str, Any]) -> float | None:
        """``final_logit_softcapping``."""
        return config["final_logit_softcapping"]

    def scale_of_embedding(self) -> float:
        """The root of the hidden size, rounded to the dtype of the weights as it was in training."""
        return float(torch.tensor(self.shape.hidden**0.5, dtype=self.dtype))

    def build_layer(self, weights: Weights, prefix: str, index: int) -> Layer:
        """Four norms: post_attention_layernorm is one of what attention adds."""
        post = {
            name: self.build_norm(weights, f"{prefix}post_{name}_layernorm")
            for name in ("attention", "feedforward")
        }
        return Layer(
            self.build_norm(weights, prefix + "input_layernorm"),
            self.build_attention(weights, prefix + "self_attn.", index),
            self.build_norm(weights, prefix + "pre_feedforward_layernorm"),
            self.build_mlp(weights, prefix, index),
            post["attention"],
            post["feedforward"],
        )


MODEL = Gemma2
