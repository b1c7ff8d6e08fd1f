"""Qwen3, dense: a Llama whose query and key heads are RMS-normed before they are turned."""

from typing import Any

import torch

from fourfold.core.errors import FourfoldError
from fourfold.engine.decoder import Decoder, Layer, SelfAttention
from fourfold.engine.layers import GatedMLP
from fourfold.engine.weights import Weights


class Qwen3(Decoder):
    """``model_type: qwen3``. Bias where ``attention_bias`` says so; sliding windows are refused."""

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """As for all decoders, and no sliding windows."""
        super().check(config)
        if config.get("use_sliding_window"):
            raise FourfoldError(
                "config.json asks for sliding window attention, which the engine does not have. Use a model "
                "without it; quantizing and converting this one work without the engine."
            )

    def build_layer(self, weights: Weights, prefix: str) -> Layer:
        """One block: as Llama's, with self_attn.{q,k}_norm."""
        s = self.shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        bias = bool(self.config.get("attention_bias"))
        qkv = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        gate_up = {"gate_proj": s.intermediate, "up_proj": s.intermediate}
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return Layer(
            weights.norm(prefix + "input_layernorm", s.hidden, s.eps),
            SelfAttention(
                s,
                weights.fused(attention, qkv, s.hidden, bias),
                weights.linear(attention + "o_proj", s.hidden, q, bias),
                self._head_norms(weights, attention),
            ),
            weights.norm(prefix + "post_attention_layernorm", s.hidden, s.eps),
            GatedMLP(
                weights.fused(mlp, gate_up, s.hidden),
                weights.linear(mlp + "down_proj", s.hidden, s.intermediate),
            ),
        )

    def _head_norms(self, weights: Weights, prefix: str) -> torch.Tensor:
        """The norm weights of all query heads, then all key heads: [heads + kv_heads, D]."""
        s = self.shape
        q, k = (weights.tensor(f"{prefix}{name}.weight", (s.head_dim,)) for name in ("q_norm", "k_norm"))
        return torch.cat([q.expand(s.heads, -1), k.expand(s.kv_heads, -1)])


MODEL = Qwen3
