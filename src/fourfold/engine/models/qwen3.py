"""Qwen3, dense: a Qwen2 whose query and key heads are RMS-normed before they turn, instead of biased."""

from typing import Any

from fourfold.engine.decoder import Biases
from fourfold.engine.models.qwen2 import Qwen2


class Qwen3(Qwen2):
    """``model_type: qwen3``. Biases of attention where ``attention_bias`` says so."""

    norms_heads = True

    @classmethod
    def biases(cls, config: dict[str, Any]) -> Biases:
        """As the config says."""
        bias = bool(config.get("attention_bias"))
        return Biases(bias, bias)


MODEL = Qwen3
