"""Qwen3, dense: a Qwen2 whose query and key heads are RMS-normed before they turn, instead of biased."""

from typing import Any

import torch

from fourfold.engine.decoder import Biases
from fourfold.engine.models.qwen2 import Qwen2
from fourfold.engine.weights import Weights


class Qwen3(Qwen2):
    """``model_type: qwen3``. Biases of attention where ``attention_bias`` says so."""

    @classmethod
    def biases(cls, config: dict[str, Any]) -> Biases:
        """As the config says."""
        bias = bool(config.get("attention_bias"))
        return Biases(bias, bias)

    def head_norms(self, weights: Weights, prefix: str) -> torch.Tensor:
        """q_norm for every query head, then k_norm for every key head."""
        s = self.shape
        q, k = (weights.tensor(f"{prefix}{name}.weight", (s.head_dim,)) for name in ("q_norm", "k_norm"))
        return torch.cat([q.expand(s.heads, -1), k.expand(s.kv_heads, -1)])


MODEL = Qwen3
